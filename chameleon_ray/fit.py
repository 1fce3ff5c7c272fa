"""``chameleon fit``: whether a model's adapters can lie in KV memory, and how many of them, from config.json alone.

The layout is the engine's own (``chameleon_kernels.layout``). No weights, no GPU, no torch.
"""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chameleon_kernels.layout import PageTooSmallError, layer_parts, plan_rows, slice_shapes

from chameleon_ray.model_shape import FAMILIES, ModelConfigError, ModelShape, obstacle, read_config

RANKS = (8, 16, 32, 64, 128, 256)
_USABLE_SHARE = 0.9  # Of a GPU's memory: vLLM's own default.
_ACTIVATIONS_GIB = 1.5
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class RankFit:
    """An adapter on all projections. blocks, bytes: of each GPU's KV memory; waste: share of them that holds nothing.

    adapters: how many lie beside the KV cache that requests need; None where the GPU's memory is not given.
    """

    rank: int
    blocks: int
    bytes: int
    waste: float
    adapters: int | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """paged: whether the engine takes the model with adapters in KV memory; reason: why not.

    kv_blocks: of each GPU; None where its memory is not given.
    """

    paged: bool
    reason: str
    block_size: int
    ranks: tuple[RankFit, ...] = ()
    kv_blocks: int | None = None

    def report(self) -> dict[str, Any]:
        """For JSON; what is not known is left out."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        known["ranks"] = [
            {name: value for name, value in asdict(rank).items() if value is not None} for rank in self.ranks
        ]
        return known


@dataclass(frozen=True, slots=True)
class Needs:
    """What runs beside adapters. kv_tokens: of all requests at once.

    adapter_memory_share: most of KV memory for adapters.
    """

    gpu_gib: float
    kv_tokens: int = 32_768
    adapter_memory_share: float = 0.5


def fit(config: dict[str, Any], name: str, *, tp: int = 1, block_size: int = 16, needs: Needs | None = None) -> Fit:
    """Of a model's configuration on ``tp`` GPUs. Raises ModelConfigError for a family that is not known here."""
    if (reason := obstacle(config)) is not None:
        return Fit(False, reason, block_size)
    if config.get("model_type") not in FAMILIES:
        raise ModelConfigError(
            f"{name} is of the family {config.get('model_type')!r}, and known are {', '.join(FAMILIES)}. Start the "
            "engine with engine.adapter_memory: paged: it looks at the model itself, and says if it cannot"
        )
    shape = ModelShape.of(config, name)
    if shape.heads % tp or shape.intermediate % tp or (shape.kv_heads % tp and tp % shape.kv_heads):
        raise ModelConfigError(f"{name} cannot be split over {tp} GPUs: it has {shape.heads} heads of attention")
    page_elems = shape.block_elems(block_size, tp)
    try:
        parts = list(layer_parts(shape.parts(tp), page_elems).values())
    except PageTooSmallError as error:
        return Fit(False, str(error), block_size)
    block_bytes = page_elems * shape.element_bytes * shape.layers
    kv_blocks = None if needs is None else max(0, int(_kv_bytes(shape, tp, needs)) // block_bytes)
    if needs is not None and not kv_blocks:
        raise ModelConfigError(f"{name} leaves no KV memory on {tp} GPUs of {needs.gpu_gib:g} GiB: use more, or larger")
    ranks = []
    for rank in RANKS:
        plan = plan_rows(parts, [rank] * len(slice_shapes(parts)), page_elems)
        adapters = None
        if needs is not None and kv_blocks is not None:
            room = min(kv_blocks - -(-needs.kv_tokens // block_size), int(needs.adapter_memory_share * kv_blocks))
            adapters = max(0, room) // plan.num_pages
        waste = round(plan.waste(parts), 4)
        ranks.append(RankFit(rank, plan.num_pages, plan.num_pages * block_bytes, waste, adapters))
    return Fit(True, "", block_size, tuple(ranks), kv_blocks)


def _kv_bytes(shape: ModelShape, tp: int, needs: Needs) -> float:
    weights = shape.weights() * shape.element_bytes / tp
    return needs.gpu_gib * _GIB * _USABLE_SHARE - weights - _ACTIVATIONS_GIB * _GIB


def configure(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", metavar="MODEL", help="folder or config.json, or a name on the Hugging Face hub")
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs that share the model (default: 1)"
    )
    parser.add_argument(
        "--block-size", type=int, default=16, metavar="B", help="tokens of a KV block (default: 16, vLLM's on GPUs)"
    )
    parser.add_argument("--gpu-gib", type=float, metavar="G", help="memory of each GPU: also count adapters that fit")
    parser.add_argument(
        "--kv-tokens",
        type=int,
        default=Needs(0).kv_tokens,
        metavar="T",
        help="tokens of all requests at once, beside which adapters have to fit (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(arguments: Namespace) -> int:
    """Print, and write if asked; 0 if the model's adapters fit, 3 if they cannot. Raises ModelConfigError."""
    needs = None if arguments.gpu_gib is None else Needs(arguments.gpu_gib, arguments.kv_tokens)
    if min(arguments.tensor_parallel_size, arguments.block_size) < 1:
        raise ModelConfigError("--tensor-parallel-size and --block-size must be at least 1")
    config = read_config(_local(arguments.model))
    found = fit(
        config, arguments.model, tp=arguments.tensor_parallel_size, block_size=arguments.block_size, needs=needs
    )
    print("\n".join(_lines(found, arguments.model, arguments.tensor_parallel_size, needs)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found.report(), indent=2) + "\n", encoding="utf-8")
    return 0 if found.paged else 3


def _local(model: str) -> Path:
    path = Path(model)
    if path.exists() or model.count("/") != 1:
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelConfigError(
            f"{model} is no folder here, and the hub does not give its config.json: {error}"
        ) from None


def _lines(found: Fit, model: str, tp: int, needs: Needs | None) -> list[str]:
    where = f"{model} on {tp} GPU{'s' if tp > 1 else ''}, KV blocks of {found.block_size} tokens"
    if not found.paged:
        return [f"{where}: adapters cannot lie in KV memory: {found.reason}", "Use engine.adapter_memory: slots."]
    lines = [f"{where}: adapters can lie in KV memory (engine.adapter_memory: paged)"]
    head = f"{'rank':>6}{'blocks':>9}{'MiB/GPU':>10}{'waste':>8}"
    if needs is not None:
        lines.append(
            f"{needs.gpu_gib:g} GiB each: about {found.kv_blocks} KV blocks (90 % of it, less weights and "
            f"{_ACTIVATIONS_GIB} GiB), of which {needs.kv_tokens} tokens of requests take "
            f"{-(-needs.kv_tokens // found.block_size)} and adapters at most {needs.adapter_memory_share:.0%}"
        )
        head += f"{'adapters':>10}"
    lines.append(head)
    for rank in found.ranks:
        line = f"{rank.rank:6}{rank.blocks:9}{rank.bytes / 2**20:10.1f}{rank.waste:8.1%}"
        lines.append(line if rank.adapters is None else f"{line}{rank.adapters:10}")
    return lines
