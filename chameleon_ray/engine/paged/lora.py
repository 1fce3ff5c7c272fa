"""vLLM's LoRA layers without slots: the same modules are wrapped, but their weights lie in pages.

vLLM makes its LoRA layers with zero slots, so no slot tensor is allocated, and the layers' own shapes say how big each
projection is on this rank. What they call to compute (``punica_wrapper``) becomes one ``PagedLinear`` per layer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from chameleon_kernels import AdapterRows, BatchSpec, LoraBatch, Part, apply_lora
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA, LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from chameleon_ray.engine.paged.checkpoint import LayerModule
from chameleon_ray.engine.paged.host import AdapterHost
from chameleon_ray.engine.paged.messages import PagedUnsupportedError
from chameleon_ray.engine.paged.options import PagedSettings

logger = init_logger(__name__)

WARM_UP_PATH = "/not/a/real/path"
"""How vLLM marks the adapters of its warm-up runs; they have no weights."""


class PagedLoRAModelManager(LRUCacheLoRAModelManager):
    """Wraps the model's linear layers; holds no weights."""

    @property
    def lora_slots(self) -> int:
        return 0

    def _create_lora_modules(self) -> None:
        unpaged = {*self.model.embedding_modules, "experts"}
        self.supported_lora_modules = [name for name in self.supported_lora_modules if name not in unpaged]
        super()._create_lora_modules()


class PagedLinear:
    """What one LoRA layer calls to add its adapters' part to its output."""

    def __init__(self, name: str, batch: LoraBatch) -> None:
        self.name = name
        self.batch = batch
        self.part: Part | None = None  # Both until the KV cache is allocated, after vLLM's profiling run.
        self.kv: torch.Tensor | None = None

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y += LoRA(x) in place; what vLLM passes of weights is empty and the scale is in the weights already."""
        if torch.compiler.is_compiling():
            # Traced before there is a KV cache: the graph holds the layer's name only, as an input (see LayerName),
            # so that layers of one shape are compiled once.
            torch.ops.vllm.chameleon_paged_lora(y, x, _encode_layer_name(self.name))
        else:
            self.add(y, x)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """The same, outside a traced graph."""
        if self.kv is not None and self.part is not None:
            apply_lora(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.kv, self.batch, self.part)


_linears: dict[str, PagedLinear] = {}


def _paged_lora(y: torch.Tensor, x: torch.Tensor, layer_name: LayerNameType) -> None:
    _linears[_resolve_layer_name(layer_name)].add(y, x)


def _paged_lora_fake(y: torch.Tensor, x: torch.Tensor, layer_name: LayerNameType) -> None:
    return None


direct_register_custom_op("chameleon_paged_lora", _paged_lora, mutates_args=["y"], fake_impl=_paged_lora_fake)


class PagedWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """What the model runner talks to: tells the kernels which token belongs to which adapter."""

    _manager_cls = PagedLoRAModelManager

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> Any:
        wrapped = super().create_lora_manager(model, vllm_config)
        max_tokens = self.max_num_batched_tokens
        max_rank = PagedSettings.of(vllm_config).max_rank
        spec = BatchSpec(max_tokens, min(self.max_num_seqs, max_tokens), max_rank)
        self._batch = LoraBatch(spec, self.device)
        self._host: AdapterHost | None = None
        self._seen: tuple[tuple[int, ...], int] | None = None
        self._linears = self._wire()
        return wrapped

    @property
    def parts(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name of a layer's part -> (in_features, output widths of its slices) on this rank, in row-table order."""
        return self._parts

    def layer_modules(self, numbered: Mapping[str, Part], number_of: Callable[[int], int]) -> list[LayerModule]:
        """Every module with LoRA. number_of: the model's layer index -> the number of its KV tensor."""
        modules = self._adapter_manager.modules
        return [
            _layer_module(
                name, modules[name], self._slice_names(name), numbered[linear_part].first_slice, number_of(index)
            )
            for name, (index, linear_part, _) in self._linears.items()
        ]

    def layer_indices(self) -> set[int]:
        """The model's layers that have LoRA."""
        return {index for index, _, _ in self._linears.values()}

    def attach(self, host: AdapterHost, numbered: Mapping[str, Part], kv_of: Callable[[int], torch.Tensor]) -> None:
        """From now on compute with the host's resident adapters. kv_of: layer index -> its KV tensor."""
        self._host = host
        for index, part, linear in self._linears.values():
            linear.part, linear.kv = numbered[part], kv_of(index)

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping | None) -> None:
        """Describe the next step to the kernels."""
        if mapping is None:
            return
        if any(request.lora_path == WARM_UP_PATH for request in requests):
            self._batch.update_for_capture(len(mapping.index_mapping))
            self._seen = None
            return
        if self._host is None:
            self._batch.update(np.full(len(mapping.index_mapping), -1), ())
            return
        seen = (mapping.index_mapping, self._host.version)
        if seen == self._seen:
            return
        ids = np.array(mapping.index_mapping, dtype=np.int64)
        used, index = np.unique(ids, return_inverse=True)
        first = int(np.searchsorted(used, 1))  # Base-model tokens carry the number 0.
        rows = [self._rows(adapter_id) for adapter_id in used[first:].tolist()]
        self._batch.update(index - first, rows)
        self._seen = seen

    def forget_step(self) -> None:
        """Describe the next step anew, although it may be like the last one: device memory was lost meanwhile."""
        self._batch.reset()
        self._seen = None

    def _rows(self, adapter_id: int) -> AdapterRows:
        assert self._host is not None
        return self._host.resident[adapter_id]

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Adapters are loaded when the first request needs them; there is nothing to do."""
        return True

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return True

    def remove_all_adapters(self) -> None:
        pass

    def pin_adapter(self, adapter_id: int) -> bool:
        raise NotImplementedError("adapters in KV memory cannot be pinned: the cache keeps the ones that are used")

    def list_adapters(self) -> set[int]:
        return set() if self._host is None else set(self._host.resident)

    def _wire(self) -> dict[str, tuple[int, str, PagedLinear]]:
        """Gives every wrapped layer its ``PagedLinear``: module name -> (layer index, part name, linear)."""
        found: dict[str, tuple[int, str, BaseLinearLayerWithLoRA]] = {}
        shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, module in self._adapter_manager.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                raise PagedUnsupportedError(f"{name} is a {type(module).__name__}, no linear layer")
            index = extract_layer_index(name)
            part = name.split(f".{index}.", 1)[1]
            shape = (module.lora_a_stacked[0].shape[-1], tuple(b.shape[2] for b in module.lora_b_stacked))
            if shapes.setdefault(part, shape) != shape:
                raise PagedUnsupportedError(f"{part} has not the same shape in every layer")
            if len(self._slice_names(name)) != module.n_slices:
                raise PagedUnsupportedError(f"{name} combines projections in a way of its own")
            found[name] = index, part, module
        self._parts = shapes
        linears = {}
        for name, (index, part, module) in found.items():
            linear = PagedLinear(name, self._batch)
            module.set_mapping(linear)
            _linears[name] = linear
            linears[name] = index, part, linear
        return linears

    def _slice_names(self, module_name: str) -> tuple[str, ...]:
        return tuple(self._adapter_manager.packed_modules.get(module_name, [module_name]))


def load_lora_model(
    runner: Any, model: torch.nn.Module, vllm_config: VllmConfig, device: torch.device
) -> torch.nn.Module:
    """Takes the place of the model runner's method of that name (``LoRAModelRunnerMixin``, both runners)."""
    runner.lora_manager = PagedWorkerLoRAManager(vllm_config, device, model.embedding_modules)
    return runner.lora_manager.create_lora_manager(model, vllm_config)


def use_pages(runner: Any) -> None:
    """Have the model runner build its LoRA layers here; before it loads the model."""
    runner.load_lora_model = partial(load_lora_model, runner)


def _layer_module(
    name: str, module: BaseLayerWithLoRA, slices: tuple[str, ...], first_slice: int, number: int
) -> LayerModule:
    def shard(cut: Callable[[Any], Any], tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        if module.tp_size == 1:
            return tensors
        if module.n_slices > 1:
            return list(cut(tensors))
        return [None if tensor is None else cut(tensor) for tensor in tensors]  # These layers take no list.

    return LayerModule(
        number, first_slice, slices, partial(shard, module.slice_lora_a), partial(shard, module.slice_lora_b)
    )
