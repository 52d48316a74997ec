"""Paged attention on GPUs: three kernels of Pallas's Triton backend, one after the other."""

import math
from typing import Any

from jaxtyping import Array, Float, Int

from pallasite.pallas_kernels.paged_attention.contract import AttentionConfig, PagedCache, Ragged
from pallasite.pallas_kernels.paged_attention.gpu_block import Inputs
from pallasite.pallas_kernels.paged_attention.gpu_decode import attend_decode
from pallasite.pallas_kernels.paged_attention.gpu_prefill import attend_prefill
from pallasite.pallas_kernels.paged_attention.gpu_write import write
from pallasite.pallas_kernels.triton import unreached


def paged_attention(
    q: Float[Array, "T N H"],
    kv_new: Float[Array, "T K 2 H"],
    cache: PagedCache,
    layer: Int[Array, ""],
    ragged: Ragged,
    config: AttentionConfig,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "T N H"], PagedCache]:
    """See the op in the package.

    Raises ValueError for a cache that Pallas would address wrongly.
    """
    refused = refused_pages(cache.values)
    if cache.values.shape[1] in refused:
        raise ValueError(
            f"got a cache {cache.values.shape} of {cache.values.dtype}; on GPUs one of 8 bits must"
            f" be of at most 2 GiB or of more than 4 GiB; give it {refused.start - 1} pages at"
            f" most, or {refused.stop} at least"
        )
    cache = write(kv_new, cache, layer, ragged, config)
    inputs = Inputs.make(q, cache, layer, ragged, config, sinks)
    out = attend_decode(inputs, config)
    if q.shape[0] > ragged.kv_lens.shape[0]:
        out = attend_prefill(inputs, out, config)
    return out, cache


def refused_pages(values: Any) -> range:
    """Returns the numbers of pages with which Pallas would address a cache like this wrongly."""
    refused = unreached(values.dtype.itemsize)
    num_elements = math.prod(values.shape) // values.shape[1]
    return range(-(-refused.start // num_elements), -(-refused.stop // num_elements))
