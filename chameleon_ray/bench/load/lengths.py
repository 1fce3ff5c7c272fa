"""Prompt and output lengths of real traffic, from a trace or the simulator's fit of one, for a given context window."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chameleon_ray.bench.load.errors import LoadError
from chameleon_ray.sim.workload import TraceError, load_trace, sample_lengths

Ints = NDArray[np.int64]

SYNTHETIC_REQUESTS = 20_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Two equally long arrays of token counts, all at least 1; entry i is one request."""

    num_prompt_tokens: Ints
    num_output_tokens: Ints


def trace_lengths(path: Path) -> Lengths:
    """The requests of a CSV in Azure's format. Raises LoadError."""
    try:
        rows = load_trace(path)
    except TraceError as error:
        raise LoadError(f"--trace: {error}; leave it out for synthetic lengths") from error
    prompts, outputs = ([row.num_prompt_tokens for row in rows], [row.num_output_tokens for row in rows])
    return Lengths(np.array(prompts), np.array(outputs))


def synthetic_lengths(seed: int) -> Lengths:
    """Requests whose lengths are distributed as in Azure's conversation trace of 2023."""
    return Lengths(*sample_lengths(SYNTHETIC_REQUESTS, np.random.default_rng(seed)))


def scaled(lengths: Lengths, context_window: int, scale: float | None = None) -> Lengths:
    """Every length times ``scale``, at least 1 token, prompt and output together at most ``context_window``.

    Without ``scale`` the longest request just fits and all proportions are kept; lengths never grow. With a larger one
    outputs are cut to the window less one token, then prompts to what is left. Raises LoadError.
    """
    if context_window < 2:
        raise LoadError(f"--context-window is {context_window}; a prompt and an answer need at least 2 tokens")
    if scale is None:
        scale = min(1.0, context_window / int(np.max(lengths.num_prompt_tokens + lengths.num_output_tokens)))
    if scale <= 0:
        raise LoadError(f"--length-scale is {scale}; give a factor above 0")
    prompts = np.maximum(np.rint(lengths.num_prompt_tokens * scale).astype(np.int64), 1)
    outputs = np.clip(np.rint(lengths.num_output_tokens * scale).astype(np.int64), 1, context_window - 1)
    return Lengths(np.minimum(prompts, context_window - outputs), outputs)
