"""What the load generator sends: lengths, arrivals, adapters, prompts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.bench.load.lengths import Lengths, scaled, synthetic_lengths, trace_lengths
from chameleon_ray.bench.load.prompts import PLAIN_WORDS, prompts_by_count, prompts_by_tokenizer
from chameleon_ray.bench.load.targets import (
    Offer,
    Target,
    common_models,
    few_adapters,
    parse_target,
    ranks_by_pattern,
    ranks_from_file,
)
from chameleon_ray.bench.load.workload import SIZE_CLASSES, Workload, adapter_shares

RANKS = {f"a-r{rank}-{number}": rank for rank in (8, 128) for number in range(4)}


def workload(seed: int = 1, ranks: dict[str, int | None] = RANKS) -> Workload:
    shares = adapter_shares(ranks, "uniform", "power_law", 1.0)
    return Workload(scaled(synthetic_lengths(3), 512), ranks, shares, seed)


def test_trace_lengths_are_scaled_to_the_window_and_keep_their_proportions(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,300,100\n2023-11-16 18:15:47,40,8\n"
    )
    lengths = scaled(trace_lengths(trace), 200)
    assert lengths.num_prompt_tokens.tolist() == [150, 20]
    assert lengths.num_output_tokens.tolist() == [50, 4]


def test_lengths_never_grow_and_a_larger_factor_cuts_what_does_not_fit() -> None:
    lengths = Lengths(np.array([90, 1]), np.array([30, 1]))
    assert scaled(lengths, 1000).num_prompt_tokens.tolist() == [90, 1]
    cut = scaled(lengths, 100, scale=2.0)
    assert (cut.num_prompt_tokens.tolist(), cut.num_output_tokens.tolist()) == ([40, 2], [60, 2])
    assert scaled(lengths, 2, scale=2.0).num_prompt_tokens.tolist() == [1, 1]


@pytest.mark.parametrize(
    "content", ["", "ContextTokens\n5\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,x,1\n"]
)
def test_an_unusable_trace_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(LoadError, match=r"--trace: .*t\.csv"):
        trace_lengths(tmp_path / "t.csv")
    with pytest.raises(LoadError, match="--context-window"):
        scaled(synthetic_lengths(0), 1)


def test_arrivals_are_poisson_and_reproducible() -> None:
    requests = workload().poisson(0, rate_per_s=50.0, duration_s=200.0)
    times = np.array([request.at_s for request in requests])
    gaps = np.diff(times)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential
    assert times.max() < 200.0
    assert requests == workload().poisson(0, 50.0, 200.0)
    assert requests != workload(seed=2).poisson(0, 50.0, 200.0)
    assert requests != workload().poisson(1, 50.0, 200.0)


def test_another_rate_sends_the_same_requests_closer_together() -> None:
    slow, fast = workload().poisson(0, 10.0, 20.0), workload().poisson(0, 40.0, 20.0)
    assert len(fast) > 2 * len(slow)
    for one, other in zip(slow, fast, strict=False):
        assert one.at_s == pytest.approx(4 * other.at_s)
        assert (one.model, one.num_prompt_tokens) == (other.model, other.num_prompt_tokens)


def test_ranks_are_alike_and_adapters_within_a_rank_follow_a_power_law() -> None:
    shares = adapter_shares(RANKS, "uniform", "power_law", 1.0)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert sum(share for model, share in shares.items() if RANKS[model] == 8) == pytest.approx(0.5)
    assert shares["a-r8-0"] == pytest.approx(4 * shares["a-r8-3"])
    counts = Counter(request.model for request in workload().one_by_one(20_000))
    assert counts["a-r128-0"] / 20_000 == pytest.approx(shares["a-r128-0"], abs=0.015)
    skewed = adapter_shares(RANKS, "power_law", "uniform", 1.0)
    assert sum(share for model, share in skewed.items() if RANKS[model] == 8) == pytest.approx(2 / 3)


def test_size_classes_are_thirds_of_the_weighted_size_at_any_rate() -> None:
    requests = workload().one_by_one(6000)
    counts = Counter(request.size_class for request in requests)
    assert all(counts[name] / 6000 == pytest.approx(1 / 3, abs=0.03) for name in SIZE_CLASSES)
    wrs = {name: [] for name in SIZE_CLASSES}
    for r in requests:
        wrs[r.size_class].append((0.4 * r.num_prompt_tokens / 512 + 0.6 * r.num_output_tokens / 36) * (r.rank or 0))
    assert np.mean(wrs["small"]) < np.mean(wrs["medium"]) < np.mean(wrs["large"])


def test_models_without_a_rank_are_sized_by_their_lengths() -> None:
    counts = Counter(r.size_class for r in workload(ranks={"base": None}).one_by_one(3000))
    assert all(counts[name] / 3000 == pytest.approx(1 / 3, abs=0.05) for name in SIZE_CLASSES)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows 40 whole words, and everything else letter by letter."""
    known = [a + b for a in "bcdfghjk" for b in ("at", "in", "op", "un", "et")]
    pieces = ["[UNK]", *(chr(code) for code in range(97, 123)), *(f"##{chr(code)}" for code in range(97, 123)), *known]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_prompts_have_exactly_the_wanted_tokens_and_are_all_different(tokenizer_folder: Path) -> None:
    count = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    prompts = prompts_by_tokenizer(tokenizer_folder, nonce=1)
    texts = [prompts.text(20) for _ in range(200)]
    assert {len(count.encode(text).ids) for text in texts} == {20}
    assert [len(count.encode(prompts.text(n)).ids) for n in (1, 2, 77)] == [1, 2, 77]
    starts = {" ".join(text.split()[:8]) for text in texts}
    assert len(starts) == 200
    again = prompts_by_tokenizer(tokenizer_folder, nonce=2).text(20)
    assert again not in texts


def test_a_shared_prefix_is_alike_in_all_prompts_and_runs(tokenizer_folder: Path) -> None:
    one, other = (prompts_by_tokenizer(tokenizer_folder, nonce, shared_prefix_tokens=6) for nonce in (1, 2))
    first, second, third = one.text(10).split(), one.text(10).split(), other.text(10).split()
    assert first[:6] == second[:6] == third[:6]
    assert len({tuple(words[6:]) for words in (first, second, third)}) == 3
    assert len(one.text(4).split()) == 4


def test_prompts_by_the_servers_count_come_close() -> None:
    def count(text: str) -> int:
        return 1 + sum(1 + (len(word) > 3) for word in text.split())

    prompts = prompts_by_count(count, nonce=5)
    counts = [count(prompts.text(200)) for _ in range(50)]
    assert np.mean(counts) == pytest.approx(200, rel=0.1)
    assert len(set(PLAIN_WORDS)) == len(PLAIN_WORDS)
    with pytest.raises(LoadError, match="--tokenizer"):
        prompts_by_count(lambda text: 7, nonce=5)


def test_an_unreadable_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"--tokenizer: .*tokenizer\.json"):
        prompts_by_tokenizer(tmp_path, nonce=0)


def test_targets_by_name_and_url() -> None:
    assert parse_target("http://h:1/v1/") == Target("h:1", "http://h:1")
    assert parse_target("stock=https://h:1") == Target("stock", "https://h:1")
    assert parse_target("http://h:1/x?a=b") == Target("h:1", "http://h:1/x?a=b")
    for wrong in ("h:1", "ftp://h", "x="):
        with pytest.raises(LoadError, match="--target"):
            parse_target(wrong)


def test_all_targets_must_serve_the_same_adapters() -> None:
    one, other = Offer("m", ("a", "b"), 512), Offer("m", ("a", "c"), None)
    assert common_models({"x": one, "y": one}, only_base=False) == ("a", "b")
    assert common_models({"x": one, "y": other}, only_base=True) == ("m",)
    with pytest.raises(LoadError, match="different adapters: b, c"):
        common_models({"x": one, "y": other}, only_base=False)
    with pytest.raises(LoadError, match="served name"):
        common_models({"x": Offer("m", (), None), "y": Offer("n", (), None)}, only_base=False)


def test_ranks_come_from_names_or_a_file(tmp_path: Path) -> None:
    assert ranks_by_pattern(["a-r8-1", "b"], r"-r(\d+)-") == {"a-r8-1": 8, "b": None}
    for wrong in ("(", "r", "(a)"):
        with pytest.raises(LoadError, match="--rank-pattern"):
            ranks_by_pattern(["a"], wrong)
    file = tmp_path / "ranks.json"
    file.write_text('{"a": 16, "z": 8}')
    assert ranks_from_file(["a"], file) == {"a": 16}
    with pytest.raises(LoadError, match="lacks b"):
        ranks_from_file(["a", "b"], file)


def test_fewer_adapters_keep_ranks_balanced() -> None:
    assert list(few_adapters(RANKS, 4)) == ["a-r8-0", "a-r8-1", "a-r128-0", "a-r128-1"]
    with pytest.raises(LoadError, match="--num-adapters"):
        few_adapters(RANKS, 9)
