"""Synthetic prompts with a wanted number of tokens, each different from all others."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_ray.bench.load.errors import LoadError

CountTokens = Callable[[str], int]

PLAIN_WORDS = re.findall(
    r"\w+",
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could",
)
MIN_WORDS, MAX_WORDS = 16, 4096
PROBE_WORDS = (32, 128)


class Prompts:
    """Makes texts of words that cost a known number of tokens.

    tokens_per_word is 1 with a tokenizer at hand and an average otherwise; extra_tokens are what the tokenizer adds to
    every text. shared_prefix_tokens: so many of each prompt's first tokens are the same in all. ``nonce`` makes this
    run's prompts differ from any earlier run's, so that a server's prefix cache does not know them.
    """

    def __init__(
        self,
        words: Sequence[str],
        tokens_per_word: float,
        extra_tokens: float,
        nonce: int,
        shared_prefix_tokens: int = 0,
    ):
        self._words = np.array(words, dtype=object)
        self._tokens_per_word, self._extra_tokens = tokens_per_word, extra_tokens
        self._rng = np.random.default_rng(nonce)
        shared = round(shared_prefix_tokens / tokens_per_word)
        self._prefix = list(self._words[np.random.default_rng(0).integers(len(words), size=shared)])

    def text(self, num_tokens: int) -> str:
        """A new prompt of ``num_tokens``, at least one word."""
        count = max(1, round((num_tokens - self._extra_tokens) / self._tokens_per_word))
        own = self._words[self._rng.integers(len(self._words), size=max(0, count - len(self._prefix)))]
        return " " + " ".join([*self._prefix[:count], *own])


def prompts_by_tokenizer(path: Path, nonce: int, shared_prefix_tokens: int = 0) -> Prompts:
    """Exact prompts, of words that are one token each. path: a ``tokenizer.json`` or a folder with one."""
    count, words = _tokenizer(path)
    words = [word for word in words if count(f" {word}{f' {word}' * 3}") - count(f" {word}") == 3][:MAX_WORDS]
    if len(words) < MIN_WORDS:
        raise LoadError(
            f"{path}: only {len(words)} words are one token each; leave --tokenizer out to let the server count"
        )
    rng = np.random.default_rng(0)
    extras = {count(" " + " ".join(rng.choice(words, size=size))) - size for size in (1, *PROBE_WORDS)}
    if len(extras) != 1:
        raise LoadError(f"{path}: words cost other tokens together; leave --tokenizer out to let the server count")
    return Prompts(words, 1.0, extras.pop(), nonce, shared_prefix_tokens)


def prompts_by_count(count: CountTokens, nonce: int, shared_prefix_tokens: int = 0) -> Prompts:
    """Approximate prompts of common English words; ``count`` is asked for the tokens of two texts."""
    rng = np.random.default_rng(nonce)
    few, many = (count(" " + " ".join(rng.choice(PLAIN_WORDS, size=size))) for size in PROBE_WORDS)
    per_word = (many - few) / (PROBE_WORDS[1] - PROBE_WORDS[0])
    if per_word <= 0:
        raise LoadError(f"the server counts {few} and {many} tokens in {PROBE_WORDS} words; give --tokenizer instead")
    return Prompts(PLAIN_WORDS, per_word, few - per_word * PROBE_WORDS[0], nonce, shared_prefix_tokens)


def _tokenizer(path: Path) -> tuple[CountTokens, list[str]]:
    """A function that counts tokens, and the vocabulary's plain lower-case words."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise LoadError("--tokenizer needs the tokenizers package: pip install tokenizers") from error
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer: Any = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise LoadError(f"--tokenizer: {file} is no readable tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoded = (tokenizer.decode([token]).strip() for token in sorted(tokenizer.get_vocab().values()))
    words = dict.fromkeys(word for word in decoded if word.isascii() and word.isalpha() and word.islower())
    return lambda text: len(tokenizer.encode(text).ids), list(words)
