"""vLLM's CPU slots with tokens that have no adapter: they must come out as the base model made them."""

from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from chameleon_ray.engine.cpu_slots import correct_wrappers

NUM_SLOTS, RANK, WIDTH = 3, 4, 8
SLOT_OF = {11: 0, 12: 1, 13: 2}


def wrapper() -> PunicaWrapperCPU:
    return PunicaWrapperCPU(max_num_batched_tokens=16, max_batches=16, device="cpu")


def added(wrapped: PunicaWrapperCPU, lora_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the wrapper adds to a projection for tokens of these adapters (0: none), and what it should add."""
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(NUM_SLOTS, 1, RANK, WIDTH, generator=rng)
    b = torch.randn(NUM_SLOTS, 1, WIDTH, RANK, generator=rng)
    x = torch.randn(len(lora_ids), WIDTH, generator=rng)
    mapping = LoRAMapping(tuple(lora_ids), tuple(lora_ids), is_prefill=True)
    wrapped.update_metadata(mapping, list(SLOT_OF), NUM_SLOTS, vocab_size=32)
    y = torch.zeros(len(lora_ids), WIDTH)
    wrapped.add_lora_linear(y, x, (a,), (b,), 1.0, (WIDTH,))
    expected = torch.zeros_like(y)
    for row, lora_id in enumerate(lora_ids):
        if lora_id:
            expected[row] = b[SLOT_OF[lora_id], 0] @ (a[SLOT_OF[lora_id], 0] @ x[row])
    return y, expected


@pytest.mark.parametrize("lora_ids", [[0, 11, 0, 12], [13, 0], [11, 12, 13], [0, 0, 13], [0, 0], [0]])
def test_only_tokens_with_an_adapter_change(lora_ids: list[int]) -> None:
    wrapped = wrapper()
    correct_wrappers(SimpleNamespace(punica_wrapper_mapping={"": wrapped}))
    torch.testing.assert_close(*added(wrapped, lora_ids))


def test_vllm_still_needs_the_correction() -> None:
    found, expected = added(wrapper(), [0, 11])
    assert not torch.allclose(found, expected), "vLLM is right by itself now: remove engine/cpu_slots.py"
