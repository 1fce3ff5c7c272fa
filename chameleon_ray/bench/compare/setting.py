"""What the engines of a comparison serve, and with how much memory: the demo model in the paper's regime, in small.

The paper's regime: adapters and KV cache compete for one memory, not all adapters fit beside the running requests, and
the batch is as large as memory allows. In small, with the demo model in float32:

- A token of KV cache takes 4 KiB; an adapter 64 KiB per rank: 0.5 MiB (rank 8) to 8 MiB (rank 128), 3.1 MiB on
  average, 310 MiB for the 100 of them. The Azure trace's lengths, scaled to 2,048 tokens, are 165 tokens in and 30 out
  on average: a request's KV cache takes 1 MiB (blocks hold 128 tokens). Adapters weigh more than in the paper.
- 128 MiB of KV pool, all of which adapters may hold while no request needs it, keep a third of the 100 adapters when
  idle. A full batch of 32 needs about 32 MiB of KV cache and 60 to 90 MiB of adapters: the pool is then just full.
- float32, because it is the demo's type, and because without bfloat16 instructions (AVX-512 or AMX) a CPU multiplies
  bfloat16 matrices four times more slowly.

Every engine has the same pool, threads, batch limit and requests. vLLM's own slots (8, each of the largest rank:
64 MiB) come on top of its pool: stock vLLM has more memory than the others.
"""

import argparse
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from chameleon_ray.bench.compare.servers import Machine
from chameleon_ray.bench.load.lengths import Lengths, scaled, synthetic_lengths, trace_lengths
from chameleon_ray.bench.load.workload import Workload, adapter_shares
from chameleon_ray.demo import RANKS, DemoPaths, make_demo

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter to serve: its folder and its rank."""

    path: Path
    rank: int


@dataclass(frozen=True, slots=True)
class Setting:
    """What all engines share, and the requests that all get."""

    machine: Machine
    adapters: Mapping[str, Adapter]
    lengths: Lengths
    workload: Workload
    adapter_share: float

    def describe(self) -> list[str]:
        """The setting in words, a line each."""
        machine, lengths = self.machine, self.lengths
        prompts, outputs = lengths.num_prompt_tokens, lengths.num_output_tokens
        return [
            f"{len(self.adapters)} adapters of ranks {', '.join(map(str, RANKS))}; {machine.kv_bytes // MIB} MiB of KV "
            f"pool, {self.adapter_share:.0%} of it open to adapters; at most {machine.max_running} requests at once; "
            f"{machine.dtype}, {machine.threads} thread(s) an engine",
            f"prompts of {prompts.mean():.0f} tokens (at most {prompts.max()}), "
            f"answers of {outputs.mean():.0f} (at most {outputs.max()})",
        ]


def make_setting(arguments: argparse.Namespace, stack: ExitStack) -> Setting:
    """The setting that the options ask for; its files are there while ``stack`` is open.

    Raises LoadError, DemoError.
    """
    demo = make_demo(arguments.demo)
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="chameleon-adapters-")))
    adapters = linked_adapters(demo, folder, arguments.adapters)
    lengths = trace_lengths(arguments.trace) if arguments.trace else synthetic_lengths(arguments.seed)
    lengths = scaled(lengths, arguments.context_window, arguments.length_scale)
    ranks: dict[str, int | None] = {name: adapter.rank for name, adapter in adapters.items()}
    machine = Machine(
        model=demo.model,
        adapters={name: adapter.path for name, adapter in adapters.items()},
        kv_bytes=arguments.kv_mib * MIB,
        max_running=arguments.max_running,
        context_window=arguments.context_window,
        max_rank=max(RANKS),
        # The servers' front ends and the client need a core as well.
        threads=arguments.threads or max(1, (os.cpu_count() or 1) - 1),
        dtype=arguments.dtype,
    )
    workload = Workload(lengths, ranks, adapter_shares(ranks, "uniform", "power-law", 1.0), arguments.seed)
    return Setting(machine, adapters, lengths, workload, arguments.adapter_share)


def linked_adapters(demo: DemoPaths, folder: Path, count: int) -> dict[str, Adapter]:
    """``count`` adapters by name, ranks in turn; their files are the demo's, linked: to an engine they all differ."""
    sources = demo.adapter_names()
    sources = sources[: len(sources) // len(RANKS) * len(RANKS)]
    adapters = {}
    for number in range(count):
        rank = RANKS[number % len(RANKS)]
        path = folder / f"demo-r{rank}-{number:03d}"
        path.mkdir()
        for file in (demo.adapters / sources[number % len(sources)]).iterdir():
            (path / file.name).symlink_to(file)
        adapters[path.name] = Adapter(path, rank)
    return adapters
