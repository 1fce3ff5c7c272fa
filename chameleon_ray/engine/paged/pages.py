"""KV-cache tensors seen as pages for weights.

vLLM hands out one view ``[num_kernel_blocks, kv_heads, tokens, content]`` per layer, laid out in memory as the
attention backend likes it. A page is a stretch of contiguous elements that belongs to one block, which has one or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import torch
from chameleon_kernels.layout import ALIGNED_ELEMS, PageTooSmallError, Part, layer_parts

from chameleon_ray.engine.paged.messages import PagedUnsupportedError


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Where a block's pages lie in a layer's KV tensor; the same for every layer. Everything counts elements.

    first: starts of block 0's pages. block_stride: from a block's page to the next block's.
    """

    first: tuple[int, ...]
    block_stride: int
    page_elems: int
    num_blocks: int

    @property
    def pages_per_block(self) -> int:
        """How many pages a block has."""
        return len(self.first)

    def page_starts(self, block_ids: Sequence[int]) -> np.ndarray:
        """Starts of all pages of the given blocks, int64 [len(block_ids) * pages_per_block], block by block."""
        blocks = np.asarray(block_ids, dtype=np.int64) * self.block_stride
        return (blocks[:, None] + np.asarray(self.first, dtype=np.int64)).reshape(-1)


def page_geometry(kv_caches: Mapping[str, torch.Tensor], num_blocks: int, dtype: torch.dtype) -> PageGeometry:
    """The geometry that all layers share. Raises PagedUnsupportedError where weights cannot live in them."""
    tensors = list(kv_caches.values())
    if len({tensor.data_ptr() for tensor in tensors}) < len(tensors):
        raise PagedUnsupportedError("some of this model's layers share one KV cache")
    if any(tensor.dtype is not dtype for tensor in tensors):
        raise PagedUnsupportedError(f"its KV cache is not kept in {dtype}, the dtype of adapter weights")
    geometries = {_geometry(tensor, num_blocks) for tensor in tensors}
    if len(geometries) != 1:
        raise PagedUnsupportedError("its layers have KV caches of different shapes")
    return geometries.pop()


def parts_in_pages(shapes: Mapping[str, tuple[int, Sequence[int]]], geometry: PageGeometry) -> dict[str, Part]:
    """A layer's parts as they lie in such pages (``layer_parts``). Raises PagedUnsupportedError if they cannot."""
    try:
        return layer_parts(shapes, geometry.page_elems)
    except PageTooSmallError as error:
        raise PagedUnsupportedError(str(error)) from error


def _geometry(kv: torch.Tensor, num_blocks: int) -> PageGeometry:
    if kv.dim() < 2 or kv.shape[0] % num_blocks:
        raise PagedUnsupportedError(f"its KV cache of shape {tuple(kv.shape)} is not made of {num_blocks} blocks")
    ratio = kv.shape[0] // num_blocks  # An attention kernel may see a block as several smaller ones.
    dims = [dim for dim in range(1, kv.dim()) if kv.shape[dim] > 1]
    inner = [dim for dim in dims if kv.stride(dim) < kv.stride(0)]
    outer = [dim for dim in dims if kv.stride(dim) >= kv.stride(0)]
    page_elems = prod(kv.shape[dim] for dim in inner)
    if 1 + sum((kv.shape[dim] - 1) * kv.stride(dim) for dim in inner) != page_elems:
        raise PagedUnsupportedError("the blocks of its KV cache have gaps")
    offsets = sorted(
        sum(index * kv.stride(dim) for index, dim in zip(indices, outer, strict=True))
        for indices in product(*(range(kv.shape[dim]) for dim in outer))
    )
    if ratio > 1 and kv.stride(0) == page_elems:
        page_elems *= ratio
    elif ratio > 1:
        offsets = sorted(offset + part * kv.stride(0) for offset in offsets for part in range(ratio))
    if any(number % ALIGNED_ELEMS for number in (*offsets, ratio * kv.stride(0), page_elems)):
        raise PagedUnsupportedError(f"the blocks of its KV cache are no multiples of {ALIGNED_ELEMS} elements")
    return PageGeometry(tuple(offsets), ratio * kv.stride(0), page_elems, num_blocks)
