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

from benchmarks.servers import Machine
from chameleon_ray.bench.load.lengths import Lengths, scaled, synthetic_lengths, trace_lengths
from chameleon_ray.bench.load.workload import Workload, adapter_shares
from chameleon_ray.random_demo import RANKS, LinkedAdapter, link_adapters, make_random_demo

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """What all engines share, and the requests that all get."""

    machine: Machine
    adapters: Mapping[str, LinkedAdapter]
    lengths: Lengths
    workload: Workload
    adapter_memory_share: float

    def describe(self) -> list[str]:
        """The setting in words, a line each."""
        machine, lengths = self.machine, self.lengths
        prompts, outputs = lengths.num_prompt_tokens, lengths.num_output_tokens
        return [
            f"{len(self.adapters)} adapters of ranks {', '.join(map(str, RANKS))}; {machine.kv_cache_bytes // MIB} "
            f"MiB of KV pool, {self.adapter_memory_share:.0%} of it open to adapters; at most {machine.max_num_seqs} "
            f"requests at once; {machine.dtype}, {machine.cpu_threads} thread(s) an engine",
            f"prompts of {prompts.mean():.0f} tokens (at most {prompts.max()}), "
            f"answers of {outputs.mean():.0f} (at most {outputs.max()})",
        ]


def add_setting(parser: argparse.ArgumentParser) -> None:
    """The options of the setting."""
    add = parser.add_argument_group("engines and requests").add_argument
    add(
        "--demo",
        type=Path,
        default=Path(".chameleon/random-demo"),
        metavar="FOLDER",
        help="the random model and adapters, made if they are not there (%(default)s)",
    )
    add("--adapters", type=int, default=100, metavar="N", help="adapters, in equal numbers of each rank (100)")
    add("--kv-cache-gib", type=float, default=0.125, help="KV pool of each engine, adapters in it included (0.125)")
    add("--adapter-memory-share", type=float, default=1.0, help="most of the pool that adapters may hold (1)")
    add("--max-num-seqs", type=int, default=32, help="requests that an engine runs at once (32)")
    add("--max-model-len", type=int, default=2048, help="tokens; lengths are scaled to fit (2048)")
    add("--length-scale", type=float, help="this factor on all lengths instead; what does not fit is cut")
    add("--trace", type=Path, metavar="CSV", help="lengths from a trace in Azure's format (default: synthetic, alike)")
    add("--cpu-threads", type=int, help="compute threads of an engine (one core less than there are)")
    add("--dtype", default="float32", help="weights, activations and KV cache (float32)")
    add("--seed", type=int, default=0, help="of arrivals, lengths and adapters (0)")


def make_setting(arguments: argparse.Namespace, stack: ExitStack) -> Setting:
    """The setting that the options ask for; its files are there while ``stack`` is open.

    Raises LoadError, DemoError.
    """
    demo = make_random_demo(arguments.demo)
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="chameleon-adapters-")))
    adapters = link_adapters(demo, folder, arguments.adapters)
    lengths = trace_lengths(arguments.trace) if arguments.trace else synthetic_lengths(arguments.seed)
    lengths = scaled(lengths, arguments.max_model_len, arguments.length_scale)
    ranks: dict[str, int | None] = {name: adapter.rank for name, adapter in adapters.items()}
    machine = Machine(
        model=demo.model,
        adapters={name: adapter.path for name, adapter in adapters.items()},
        kv_cache_bytes=int(arguments.kv_cache_gib * GIB),
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len,
        max_rank=max(RANKS),
        # The servers' front ends and the client need a core as well.
        cpu_threads=arguments.cpu_threads or max(1, (os.cpu_count() or 1) - 1),
        dtype=arguments.dtype,
    )
    workload = Workload(lengths, ranks, adapter_shares(ranks, "uniform", "power_law", 1.0), arguments.seed)
    return Setting(machine, adapters, lengths, workload, arguments.adapter_memory_share)
