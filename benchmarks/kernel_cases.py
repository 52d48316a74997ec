"""Pallasite's attention kernels as cases to compile, each alone, with the shapes of a model.

`compile_for` calls these functions by name in a process of its own.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    gpu_decode,
    gpu_prefill,
    gpu_write,
    tpu_decode,
    tpu_prefill,
    tpu_write,
)
from pallasite.pallas_kernels.paged_attention.gpu_block import Inputs
from pallasite.pallas_kernels.paged_attention.tpu_blocks import (
    decode_blocks,
    prefill_blocks,
    vmem_limit,
)
from pallasite.pallas_kernels.paged_attention.tpu_decode import DecodeBlocks
from pallasite.pallas_kernels.paged_attention.tpu_pages import NewRows
from pallasite.pallas_kernels.paged_attention.tpu_parts import multiplied_as
from pallasite.pallas_kernels.paged_attention.tpu_prefill import PrefillBlocks
from pallasite.pallas_kernels.paged_attention.tpu_products import LANES, Products, Scoring
from pallasite.pallas_kernels.target import Target


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What kernels are compiled for; Llama 3 8B's heads, where nothing else is said.

    Attributes:
        num_heads: query heads N.
        num_kv_heads: key heads K.
        head_width: H.
        page: cached tokens of a page.
        cache: the cache's dtype.
        num_requests: rows of a decode step.
        num_tokens: of a prefill step's bucket.
        max_len: the longest request's tokens.
        cache_bytes: how large the cache is, about: too large for memory on the chip.
    """

    num_heads: int = 32
    num_kv_heads: int = 8
    head_width: int = 128
    page: int = 128
    cache: str = "bfloat16"
    num_requests: int = 64
    num_tokens: int = 2048
    max_len: int = 32768
    cache_bytes: int = 3 * 2**30

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def held_as(self) -> jnp.dtype:
        return jnp.dtype(self.cache)

    @property
    def pages_a_row(self) -> int:
        return -(-self.max_len // self.page)

    @property
    def num_pages(self) -> int:
        row_bytes = 2 * self.num_kv_heads * self.head_width * self.held_as.itemsize
        return max(self.cache_bytes // (row_bytes * self.page), 1)

    def paged_cache(self, target: Target) -> PagedCache:
        """Returns a cache of one layer, abstract."""
        num_rows, width = target.cache_row(self.head_width)
        heads = 1, self.num_pages, self.num_kv_heads
        values = struct((*heads, num_rows, self.page, width), self.held_as)
        if self.held_as.itemsize > 1:
            return PagedCache(values=values)
        return PagedCache(values=values, scales=struct((*heads, 2, self.page), jnp.float32))

    def new_rows(self, target: Target, num_tokens: int) -> NewRows:
        """Returns the rows of new tokens as the TPU's kernels take them."""
        num_rows, width = target.cache_row(self.head_width)
        rows = struct((num_tokens, self.num_kv_heads * num_rows, width), jnp.float32)
        if self.held_as.itemsize > 1:
            return NewRows(rows, None)
        return NewRows(rows, struct((num_tokens, self.num_kv_heads * 2, LANES), jnp.float32))

    def scoring(self, target: Target) -> Scoring:
        """Returns scores without a cap or windows."""
        products = Products.of(self.held_as, target)
        return Scoring(products=products, cap=None, has_window=False)

    def decode_blocks(self, target: Target) -> DecodeBlocks:
        """Returns the block sizes that the op takes."""
        return decode_blocks(self.paged_cache(target), self.pages_a_row, self.group, target)

    def prefill_blocks(self, target: Target) -> PrefillBlocks:
        """Returns the block sizes that the op takes."""
        return prefill_blocks(
            self.paged_cache(target), self.pages_a_row, self.num_tokens, self.group, target
        )


def tpu_decode_case(
    target: Target, shapes: dict[str, Any], blocks: dict[str, int] | None = None
) -> Case:
    """The TPU's decode with its write; `blocks` other than the op's to try them."""
    s = Shapes(**shapes)
    taken = s.decode_blocks(target) if blocks is None else DecodeBlocks(**blocks)
    width = target.cache_row(s.head_width)[1]
    q = struct((s.num_requests, s.num_kv_heads, -(-s.group // 8) * 8, width), jnp.float32)
    scalars = tpu_decode.Scalars(
        layer=ints(1),
        window=ints(1),
        num_decode=ints(1),
        kv_lens=ints(s.num_requests),
        page_table=ints(s.num_requests * s.pages_a_row),
    )

    def function(q: Any, new: Any, cache: PagedCache, scalars: tpu_decode.Scalars) -> Any:
        scoring, limit = s.scoring(target), vmem_limit(target)
        return tpu_decode.decode(q, new, None, cache, scalars, scoring, taken, limit, False)

    arguments = q, s.new_rows(target, s.num_requests), s.paged_cache(target), scalars
    return Case(function, arguments, donated=(2,))


def tpu_prefill_case(
    target: Target, shapes: dict[str, Any], blocks: dict[str, int] | None = None
) -> Case:
    """The TPU's prefill; `blocks` other than the op's to try them."""
    s = Shapes(**shapes)
    taken = s.prefill_blocks(target) if blocks is None else PrefillBlocks(**blocks)
    width = target.cache_row(s.head_width)[1]
    num_rows = -(-s.num_tokens // taken.tokens) * taken.tokens * s.group
    q = struct((s.num_kv_heads, num_rows, width), multiplied_as(s.held_as))
    num_pairs = -(-s.num_tokens // taken.tokens) + s.num_requests
    scalars = tpu_prefill.Scalars(
        layer=ints(1),
        window=ints(1),
        kv_lens=ints(s.num_requests),
        query_starts=ints(s.num_requests + 1),
        page_table=ints(s.num_requests * s.pages_a_row),
        num_pairs=ints(1),
        pair_requests=ints(num_pairs),
        pair_tiles=ints(num_pairs),
    )

    def function(q: Any, cache: PagedCache, scalars: tpu_prefill.Scalars) -> Any:
        scoring, limit = s.scoring(target), vmem_limit(target)
        return tpu_prefill.prefill(q, None, cache, scalars, scoring, taken, s.group, limit, False)

    return Case(function, (q, s.paged_cache(target), scalars))


def tpu_write_case(target: Target, shapes: dict[str, Any]) -> Case:
    """The TPU's write of requests with several new tokens."""
    s = Shapes(**shapes)
    most = s.num_tokens // s.page + 2 * s.num_requests
    scalars = tpu_write.Scalars(
        layer=ints(1),
        kv_lens=ints(s.num_requests),
        query_starts=ints(s.num_requests + 1),
        page_table=ints(s.num_requests * s.pages_a_row),
        num_pages=ints(1),
        page_requests=ints(most),
        page_numbers=ints(most),
    )

    def function(new: Any, cache: PagedCache, scalars: tpu_write.Scalars) -> PagedCache:
        return tpu_write.write(new, cache, scalars, vmem_limit(target), False)

    arguments = s.new_rows(target, s.num_tokens), s.paged_cache(target), scalars
    return Case(function, arguments, donated=(1,))


def gpu_write_case(target: Target, shapes: dict[str, Any]) -> Case:
    """The GPU's write of all new rows."""
    s = Shapes(**shapes)
    kv_new = struct((s.num_tokens, s.num_kv_heads, 2, s.head_width), jnp.float32)

    def function(kv_new: Any, cache: PagedCache, layer: Any, batch: dict[str, Any]) -> PagedCache:
        return gpu_write.write(kv_new, cache, layer, Ragged(**batch), _config(s, target))

    arguments = kv_new, s.paged_cache(target), ints(), _batch(s, s.num_tokens)
    return Case(function, arguments, donated=(1,))


def gpu_decode_case(target: Target, shapes: dict[str, Any]) -> Case:
    """The GPU's decode: parts of requests, and what merges them."""
    s = Shapes(**shapes)

    def function(q: Any, cache: PagedCache, layer: Any, batch: dict[str, Any]) -> Any:
        config = _config(s, target)
        inputs = Inputs.make(q, cache, layer, Ragged(**batch), config, None)
        return gpu_decode.attend_decode(inputs, config)

    return Case(function, _gpu_arguments(s, target, s.num_requests))


def gpu_prefill_case(target: Target, shapes: dict[str, Any]) -> Case:
    """The GPU's prefill."""
    s = Shapes(**shapes)

    def function(q: Any, cache: PagedCache, layer: Any, batch: dict[str, Any]) -> Any:
        config = _config(s, target)
        inputs = Inputs.make(q, cache, layer, Ragged(**batch), config, None)
        return gpu_prefill.attend_prefill(inputs, jnp.zeros(q.shape, jnp.float32), config)

    return Case(function, _gpu_arguments(s, target, s.num_tokens))


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return struct(shape, jnp.int32)


def plain(shapes: Any) -> dict[str, Any]:
    """Returns what a dataclass is made of, as JSON holds it."""
    return dataclasses.asdict(shapes)


def _gpu_arguments(s: Shapes, target: Target, num_tokens: int) -> tuple[Any, ...]:
    q = struct((num_tokens, s.num_heads, s.head_width), jnp.float32)
    return q, s.paged_cache(target), ints(), _batch(s, num_tokens)


def _batch(s: Shapes, num_tokens: int) -> dict[str, Any]:
    """Returns what `Ragged` is made of."""
    return {
        "positions": ints(num_tokens),
        "kv_lens": ints(s.num_requests),
        "query_starts": ints(s.num_requests + 1),
        "page_table": ints(s.num_requests, s.pages_a_row),
        "num_requests": ints(),
        "num_decode": ints(),
    }


def _config(s: Shapes, target: Target) -> AttentionConfig:
    return AttentionConfig(scale=s.head_width**-0.5, target=target)
