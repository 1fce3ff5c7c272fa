"""Pages in KV tensors of any layout, and adapters' files in page order, without an engine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chameleon_kernels import AdapterRows, BatchSpec, LoraBatch, apply_lora, layer_parts
from safetensors.torch import load_file

from chameleon_ray.adapters.modules import Module, ModuleTable
from chameleon_ray.demo import DemoPaths
from chameleon_ray.engine.paged.checkpoint import LayerModule, pack_plan, read_pages, summarise
from chameleon_ray.engine.paged.messages import ModelLayout, PagedUnsupportedError
from chameleon_ray.engine.paged.options import PagedSettings, paged_arguments
from chameleon_ray.engine.paged.pages import PageGeometry, page_geometry, parts_in_pages

BLOCKS, HEADS, TOKENS, CONTENT = 6, 2, 8, 64


def _one_block_per_page() -> torch.Tensor:
    return torch.zeros(BLOCKS, HEADS, TOKENS, CONTENT)


def _heads_outside() -> torch.Tensor:
    return torch.zeros(HEADS, BLOCKS, TOKENS, CONTENT).transpose(0, 1)


def _tokens_before_heads() -> torch.Tensor:
    return torch.zeros(BLOCKS, TOKENS, HEADS, CONTENT).transpose(1, 2)


def _layer_of_an_interleaved_cache() -> torch.Tensor:
    return torch.zeros(BLOCKS, 3, HEADS, TOKENS, CONTENT)[:, 1]


def _kernel_blocks_half_as_large() -> torch.Tensor:
    return torch.zeros(2 * BLOCKS, HEADS, TOKENS // 2, CONTENT)


def _kernel_blocks_with_heads_outside() -> torch.Tensor:
    return torch.zeros(HEADS, 2 * BLOCKS, TOKENS // 2, CONTENT).transpose(0, 1)


LAYOUTS = [
    _one_block_per_page,
    _heads_outside,
    _tokens_before_heads,
    _layer_of_an_interleaved_cache,
    _kernel_blocks_half_as_large,
    _kernel_blocks_with_heads_outside,
]


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__.strip("_"))
def test_pages_of_a_block_are_the_memory_that_vllm_indexes_by_its_id(make) -> None:
    kv = make()
    geometry = page_geometry({"layer": kv}, BLOCKS, torch.float32)
    assert geometry.pages_per_block * geometry.page_elems == HEADS * TOKENS * CONTENT
    memory = kv.as_strided((kv.untyped_storage().nbytes() // 4 - kv.storage_offset(),), (1,))
    for start in geometry.page_starts([4, 1]).tolist():
        memory[start : start + geometry.page_elems] += 1
    ratio = kv.shape[0] // BLOCKS
    for block in range(BLOCKS):
        expected = 1.0 if block in (4, 1) else 0.0
        assert (kv[block * ratio : (block + 1) * ratio] == expected).all()


@pytest.mark.parametrize(
    ("caches", "reason"),
    [
        ({"a": torch.zeros(6, 2, 8, 64, dtype=torch.uint8)}, "dtype"),
        ({"a": torch.zeros(6, 2, 8, 64), "b": torch.zeros(6, 2, 8, 32)}, "shapes"),
        ({"a": torch.zeros(6, 2, 8, 80)[..., :64]}, "gaps"),
        ({"a": torch.zeros(6, 3, 1, 84)}, "multiples of 8"),
        ({"a": torch.zeros(7, 2, 8, 64)}, "blocks"),
        (dict.fromkeys("ab", torch.zeros(6, 2, 8, 64)), "share"),
    ],
)
def test_kv_caches_that_cannot_hold_weights_are_refused_with_the_reason(caches, reason: str) -> None:
    with pytest.raises(PagedUnsupportedError, match=reason) as error:
        page_geometry(caches, 6, torch.float32)
    assert "engine.adapter_memory: slots" in str(error.value)


HIDDEN, KV_WIDTH, INTERMEDIATE, NUM_LAYERS = 256, 128, 512, 4


def test_pages_too_small_for_weights_are_refused_at_start() -> None:
    """The scheduler hears of it with the layout, before any adapter: then the engine falls back to slots."""
    geometry = page_geometry({"a": torch.zeros(6, 2, 1, 64)}, 6, torch.float32)
    with pytest.raises(PagedUnsupportedError, match="holds 128 elements"):
        parts_in_pages({"mlp.down_proj": (704, (256,))}, geometry)


def _demo_layout(geometry: PageGeometry, num_blocks: int) -> tuple[ModelLayout, list[LayerModule]]:
    parts = {
        "self_attn.qkv_proj": (HIDDEN, (HIDDEN, KV_WIDTH, KV_WIDTH)),
        "self_attn.o_proj": (HIDDEN, (HIDDEN,)),
        "mlp.gate_up_proj": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
        "mlp.down_proj": (INTERMEDIATE, (HIDDEN,)),
    }
    members = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
    numbered = layer_parts(parts, geometry.page_elems)
    modules = [
        LayerModule(
            layer,
            numbered[part].first_slice,
            tuple(f"model.layers.{layer}.{name}" for name in members.get(part, (part,))),
            list,
            list,
        )
        for layer in range(NUM_LAYERS)
        for part in parts
    ]
    targets = {
        name: (module.layer, module.first_slice + i) for module in modules for i, name in enumerate(module.slices)
    }
    sizes = [(width, in_features) for in_features, widths in parts.values() for width in widths]
    table = ModuleTable({name: Module(name, *sizes[number]) for name, (_, number) in targets.items()})
    pages = geometry.page_elems, geometry.pages_per_block
    layout = ModelLayout(parts, table, targets, NUM_LAYERS, *pages, num_blocks, element_bytes=4)
    return layout, modules


@pytest.mark.parametrize(("pages_per_block", "block_tokens"), [(1, 128), (2, 128), (1, 2)])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_files_read_into_pages_compute_what_the_checkpoint_says(
    demo: DemoPaths, index: int, pages_per_block: int, block_tokens: int
) -> None:
    """Blocks of two tokens: rows wider than a page."""
    folder = demo.adapters / demo.adapter_names()[index]
    num_blocks, block_elems = 64 * 128 // block_tokens, 4 * block_tokens * 64
    shape = (pages_per_block, num_blocks, block_elems // pages_per_block)
    kv_layers = [torch.full(shape, float("nan")).transpose(0, 1) for _ in range(NUM_LAYERS)]
    geometry = page_geometry({str(i): kv for i, kv in enumerate(kv_layers)}, num_blocks, torch.float32)
    assert geometry.pages_per_block == pages_per_block
    layout, modules = _demo_layout(geometry, num_blocks)

    summary = summarise(folder, layout, max_rank=128)
    assert summary.rank == (8, 16, 32, 64, 128)[index]
    plan = pack_plan(layout, summary.slice_ranks)
    pages = torch.zeros(NUM_LAYERS, plan.num_pages, layout.page_elems)
    read_pages(folder, layout, modules, summary.slice_ranks, pages, check_finite=True)
    assert pages.nbytes == summary.size_bytes

    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))[: summary.num_blocks].tolist()
    starts = geometry.page_starts(blocks)[: plan.num_pages]
    for kv, layer in zip(kv_layers, pages, strict=True):
        memory = kv.as_strided((kv.untyped_storage().nbytes() // 4,), (1,))
        for start, page in zip(starts.tolist(), layer, strict=True):
            memory[start : start + layout.page_elems] = page
    rows = AdapterRows.build(plan, starts, "cpu")
    batch = LoraBatch(BatchSpec(max_tokens=8, max_adapters=2, max_rank=128), "cpu")
    batch.update([0, -1, 0], [rows])

    tensors = load_file(folder / "adapter_model.safetensors")
    part = layer_parts(layout.parts, layout.page_elems)["mlp.gate_up_proj"]
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(2))
    y = torch.zeros(3, part.out_features)
    apply_lora(y, x, kv_layers[3], batch, part)
    for i, name in enumerate(("gate_proj", "up_proj")):
        prefix = f"base_model.model.model.layers.3.mlp.{name}.lora_"
        expected = 2.0 * x @ tensors[prefix + "A.weight"].T @ tensors[prefix + "B.weight"].T
        expected[1] = 0.0
        torch.testing.assert_close(y[:, i * INTERMEDIATE : (i + 1) * INTERMEDIATE], expected, rtol=1e-4, atol=1e-4)


def test_settings_reach_vllm_and_unknown_ones_are_named() -> None:
    given = paged_arguments(PagedSettings(adapter_memory_share=0.25))["additional_config"]
    settings = PagedSettings.of(SimpleNamespace(additional_config=given))
    assert settings.cache_config(1000).max_blocks == 250
    with pytest.raises(ValueError, match="memory_shar'"):
        PagedSettings.of(SimpleNamespace(additional_config={"chameleon": {"memory_shar": 0.5}}))
    with pytest.raises(ValueError, match="adapter_memory_share"):
        PagedSettings(adapter_memory_share=0)


def test_folder_missing(tmp_path: Path) -> None:
    layout, _ = _demo_layout(PageGeometry((0,), 32768, 32768, 64), 64)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        summarise(tmp_path / "nowhere", layout, max_rank=8)
