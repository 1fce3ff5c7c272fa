"""vLLM's LoRA slots on CPU, corrected for batches that mix requests with and without an adapter.

vLLM 0.30 marks a token without adapter by the slot index -1. Its GPU kernels skip such tokens; its CPU kernels
(vllm/lora/ops/torch_ops) index with it, and so give the base model's requests the adapter in the last slot as soon as
all slots are taken.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class BaseTokensUntouched(PunicaWrapperCPU):
    """As vLLM's, but A @ x, and with it what is added to the projection, is zero for tokens without adapter."""

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        super()._apply_shrink(y, x, w_t_all, scale)
        if not self.no_lora:
            y.view(-1, y.shape[-1])[self.token_lora_indices < 0] = 0


def correct_wrappers(adapter_manager: Any) -> None:
    """Make every CPU wrapper of vLLM's adapter manager leave the base model's tokens alone; others stay as they are.

    vLLM does not compile models with LoRA on CPU, so that exchanging the class has effect at any time.
    """
    for wrapper in adapter_manager.punica_wrapper_mapping.values():
        if type(wrapper) is PunicaWrapperCPU:
            wrapper.__class__ = BaseTokensUntouched
