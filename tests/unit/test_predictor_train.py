"""Training on logged requests with a real encoder, and what is on disk afterwards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from predictor_logs import ASKS, encoder_folder, requests, write_log

from chameleon_ray.cli import main
from chameleon_ray.predictor.encoder import Encoder
from chameleon_ray.predictor.errors import PredictorError
from chameleon_ray.predictor.head import length_loss
from chameleon_ray.predictor.lengths import LengthFeatures, length_bucket
from chameleon_ray.predictor.proxy import ProxyPredictor
from chameleon_ray.predictor.saved import Description
from chameleon_ray.predictor.train import TrainOptions, make_buckets, report, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Description]:
    folder = tmp_path_factory.mktemp("trained")
    log = write_log(folder / "log.jsonl", requests(400))
    return folder / "out", train([log], encoder_folder(), folder / "out", TrainOptions(buckets=4))


@pytest.fixture
def copied(trained: tuple[Path, Description], tmp_path: Path) -> Path:
    return shutil.copytree(trained[0], tmp_path / "copied")


def asked(prompt: str, max_tokens: int | None = None) -> LengthFeatures:
    return LengthFeatures("a", 12, max_tokens, prompt_text=prompt)


def test_it_beats_history_and_the_commonest_bucket_where_prompts_decide(trained: tuple[Path, Description]) -> None:
    _, description = trained
    proxy, history = description.accuracy["proxy"], description.accuracy["history"]
    commonest = description.accuracy["commonest bucket"]
    for baseline in (history, commonest):
        assert proxy.right_bucket_share > baseline.right_bucket_share + 0.2
        assert proxy.within_one_bucket_share >= baseline.within_one_bucket_share
        assert proxy.mean_absolute_error_tokens < baseline.mean_absolute_error_tokens / 2
    assert (description.trained_on.num_requests, description.trained_on.num_held_out) == (320, 80)
    table = "\n".join(report(description))
    assert f"{proxy.right_bucket_share:.1%}" in table and "history" in table and "commonest bucket" in table


def test_what_was_loaded_reads_prompts_it_has_not_seen(trained: tuple[Path, Description]) -> None:
    folder, description = trained
    predictor = ProxyPredictor.load(folder, max_model_len=8192)
    edges = description.bucket_edges
    for ask, (low, high) in ASKS.items():
        tokens = predictor.predict(asked(ask.format("the moon landing")))
        assert length_bucket(tokens, edges) in range(length_bucket(low, edges), length_bucket(high, edges) + 1), ask
    story = next(ask for ask in ASKS if "story" in ask).format("bees")
    assert predictor.predict(asked(story, max_tokens=50)) == 50


def test_saving_and_loading_keep_every_prediction_and_training_repeats_with_its_seed(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", requests(120))

    def files(name: str, seed: int) -> dict[str, bytes]:
        train([log], encoder_folder(), tmp_path / name, TrainOptions(buckets=3, epochs=3, seed=seed))
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = files("a", 1)
    assert first == files("b", 1)
    assert first["head.safetensors"] != files("c", 2)["head.safetensors"]
    prompts = [asked(entry.prompt) for entry in requests(30, seed=9)]
    loaded = [ProxyPredictor.load(tmp_path / name, 8192) for name in "ab"]
    assert loaded[0].predict_batch(prompts) == loaded[1].predict_batch(prompts)
    assert loaded[0].predict_batch(prompts) == [loaded[0].predict(one) for one in prompts]


def test_torchs_random_state_is_left_alone(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", requests(100))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train([log], encoder_folder(), tmp_path / "out", TrainOptions(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_an_output_cut_short_counts_as_that_long_or_longer() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]]))
    bucket = torch.tensor([1])
    assert length_loss(logits, bucket, torch.tensor([False])).item() == pytest.approx(-torch.log(torch.tensor(0.2)))
    assert length_loss(logits, bucket, torch.tensor([True])).item() == pytest.approx(-torch.log(torch.tensor(0.9)))


def test_buckets_part_the_outputs_evenly_and_predict_their_median() -> None:
    entries = [entry.model_copy(update={"output_tokens": n + 1}) for n, entry in enumerate(requests(100))]
    edges, tokens = make_buckets(entries, 4)
    counts = [sum(length_bucket(n + 1, edges) == i for n in range(100)) for i in range(4)]
    assert sum(counts) == 100 and max(counts) - min(counts) <= 2
    assert all(length_bucket(length, edges) == i for i, length in enumerate(tokens))


Spoil = Callable[[Path], object]


def edit(**fields: object) -> Spoil:
    def write(folder: Path) -> None:
        path = folder / "predictor.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return write


def flip_a_byte(folder: Path) -> None:
    path = folder / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "predictor.json").unlink(), "predictor.json: not readable"),
        (lambda folder: (folder / "predictor.json").write_text("{"), "predictor.json: not a predictor's description"),
        (edit(format=2), "predictor.json.*format"),
        (edit(extra=1), "predictor.json.*extra"),
        (edit(bucket_edges=[5]), "predictor.json.*bucket_tokens must be one more"),
        (edit(bucket_edges=[5, 5, 5]), "predictor.json.*must rise"),
        (edit(encoder_path="/nowhere"), "encoder /nowhere: no config.json"),
        (edit(encoder_digest="0" * 64), "trained with another encoder"),
        (edit(window=100_000), "window of 100000 tokens"),
        (lambda folder: (folder / "head.safetensors").unlink(), "head.safetensors: not readable"),
        (flip_a_byte, "head.safetensors: not the weights"),
        (lambda folder: (folder / "head.safetensors").write_bytes(b""), "head.safetensors: not the weights"),
    ],
)
def test_a_broken_predictor_is_refused_by_name(copied: Path, spoil: Spoil, message: str) -> None:
    spoil(copied)
    with pytest.raises(PredictorError, match=message):
        ProxyPredictor.load(copied, 8192)


def test_an_encoder_in_the_predictors_own_folder_goes_first(copied: Path) -> None:
    edit(encoder_path="/nowhere")(copied)
    (copied / "encoder").symlink_to(encoder_folder())
    assert ProxyPredictor.load(copied, 8192).predict(asked("Answer with yes or no: is it so?")) < 100


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    broken = shutil.copytree(encoder_folder(), tmp_path / "broken", ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(PredictorError, match=r"no \*.safetensors"):
        Encoder(broken, 64)
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(PredictorError, match="cannot load it"):
        Encoder(broken, 64)


def test_pooling_changes_the_vectors_and_batching_does_not() -> None:
    texts = ["short", "a much longer prompt that makes the other one need padding"]
    mean, cls = Encoder(encoder_folder(), 32), Encoder(encoder_folder(), 32, "cls")
    together = mean.embed(texts)
    assert torch.allclose(together, torch.cat([mean.embed([text]) for text in texts]), atol=1e-5)
    assert together.shape == (2, 384) and not torch.allclose(together, cls.embed(texts), atol=1e-2)


def test_of_a_long_prompt_both_ends_are_read_and_the_middle_is_not() -> None:
    encoder, filler = Encoder(encoder_folder(), 32), "filler " * 5000
    whole = encoder.embed([f"Be brief. {filler} bees {filler} Thanks."])
    assert torch.allclose(whole, encoder.embed([f"Be brief. {filler} ships {filler} Thanks."]), atol=1e-6)
    assert not torch.allclose(whole, encoder.embed([f"Be long. {filler} bees {filler} Thanks."]), atol=1e-3)
    assert not torch.allclose(whole, encoder.embed([f"Be brief. {filler} bees {filler} Cheers."]), atol=1e-3)


def test_the_command_trains_and_prints_the_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log.jsonl", requests(120))
    out = tmp_path / "out"
    command = ["train-predictor", "--requests", str(log), "--encoder", str(encoder_folder()), "--out", str(out)]
    assert main([*command, "--epochs", "2", "--buckets", "3", "--window", "32"]) == 0
    printed = capsys.readouterr()
    assert "right bucket" in printed.out and f"engine.length_predictor={out}" in printed.out
    assert "encoding" in printed.err and "training" in printed.err
    assert {path.name for path in out.iterdir()} == {"head.safetensors", "predictor.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--requests": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"--requests": "few.jsonl"}, "99 requests that ended"),
        ({"--requests": "bad.jsonl"}, "bad.jsonl:3: not a logged request: output_tokens"),
        ({"--requests": "equal.jsonl"}, "nearly all logged outputs have 7 tokens"),
        ({"--requests": "cut.jsonl"}, "no logged request ended by itself"),
        ({"--encoder": "nowhere"}, "no config.json there"),
        ({"--out": "log.jsonl"}, "log.jsonl: cannot be written"),
        ({"--buckets": "1"}, "buckets must be at least 2"),
        ({"--window": "9999"}, "window of 9999 tokens; it takes 8 to 512"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = list(requests(120))
    write_log(Path("log.jsonl"), entries)
    write_log(Path("few.jsonl"), entries[:99])
    write_log(Path("equal.jsonl"), [entry.model_copy(update={"output_tokens": 7}) for entry in entries])
    write_log(Path("cut.jsonl"), [entry.model_copy(update={"finish_reason": "length"}) for entry in entries])
    lines = Path("log.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"output_tokens":', '"output_tokens":"many", "was":')
    Path("bad.jsonl").write_text("\n".join(lines) + "\n")
    given = {"--requests": "log.jsonl", "--encoder": str(encoder_folder()), "--out": "out"} | arguments
    assert main(["train-predictor", *(word for option in given.items() for word in option)]) == 1
    assert message in capsys.readouterr().err
