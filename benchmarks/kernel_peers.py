"""The attention kernels that come with JAX, as cases to compile with the shapes of Pallasite's.

None of them writes the cache: who calls them scatters the new rows before. `compile_for` calls
these functions by name in a process of its own.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.gpu import paged_attention as gpu_paged_attention
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.paged_attention.quantization_utils import QuantizedTensor
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from benchmarks.kernel_cases import Shapes, ints, struct
from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.paged_attention.tpu_blocks import vmem_limit
from pallasite.pallas_kernels.target import Target

_Q_TYPE = jnp.bfloat16


def ragged_case(target: Target, shapes: dict[str, Any], block_pages: int, num_queries: int) -> Case:
    """`ragged_paged_attention`: decode and prefill in one kernel, blocks of pages and queries."""
    s = Shapes(**shapes)
    scale = 1.0 if s.held_as.itemsize == 1 else None

    def function(q: Any, pages: Any, kv_lens: Any, page_table: Any, starts: Any, num: Any) -> Any:
        return ragged_paged_attention(
            q,
            pages,
            kv_lens,
            page_table,
            starts,
            num,
            sm_scale=s.head_width**-0.5,
            k_scale=scale,
            v_scale=scale,
            num_kv_pages_per_block=block_pages,
            num_queries_per_block=num_queries,
            vmem_limit_bytes=vmem_limit(target),
        )

    arguments = (
        struct((s.num_tokens, s.num_heads, s.head_width), _Q_TYPE),
        struct((s.num_pages, s.page, 2 * s.num_kv_heads, s.head_width), s.held_as),
        ints(s.num_requests),
        ints(s.num_requests, s.pages_a_row),
        ints(s.num_requests + 1),
        ints(1),
    )
    return Case(function, arguments)


def paged_case(target: Target, shapes: dict[str, Any], block_pages: int) -> Case:
    """`paged_attention` of TPUs: decode, a key head at a time."""
    s = Shapes(**shapes)
    pages: Any = struct((s.num_kv_heads, s.num_pages, s.page, s.head_width), s.held_as)
    if s.held_as == jnp.int8:
        scales = struct((s.num_kv_heads, s.num_pages, s.page, 1), jnp.float32)
        pages = QuantizedTensor(pages, scales)

    def function(q: Any, keys: Any, values: Any, kv_lens: Any, page_table: Any) -> Any:
        return paged_attention(
            q, keys, values, kv_lens, page_table, pages_per_compute_block=block_pages
        )

    q = struct((s.num_requests, s.num_heads, s.head_width), _Q_TYPE)
    lens, table = ints(s.num_requests), ints(s.num_requests, s.pages_a_row)
    return Case(function, (q, pages, pages, lens, table))


def gpu_paged_case(target: Target, shapes: dict[str, Any]) -> Case:
    """`paged_attention` of GPUs: decode, 128 cached tokens at once."""
    s = Shapes(**shapes)
    q = struct((s.num_requests, s.num_heads, s.head_width), _Q_TYPE)
    pages = struct((s.num_kv_heads, s.num_pages, s.page, s.head_width), s.held_as)
    scales = None
    if s.held_as.itemsize == 1:
        scales = struct((s.num_kv_heads, s.num_pages, s.page), jnp.float32)
    table, lens = ints(s.num_requests, s.pages_a_row), ints(s.num_requests)

    def function(q: Any, keys: Any, values: Any, table: Any, lens: Any, *scales: Any) -> Any:
        return gpu_paged_attention.paged_attention(
            q, keys, values, table, lens, *scales, pages_per_compute_block=max(128 // s.page, 1)
        )

    return Case(function, (q, pages, pages, table, lens, scales, scales))


def gpu_mha_case(target: Target, shapes: dict[str, Any]) -> Case:
    """`mha` of GPUs: prefill of whole prompts, without pages, a key head for each query head."""
    s = Shapes(**shapes)
    x = struct((1, s.num_tokens, s.num_heads, s.head_width), _Q_TYPE)

    def function(q: Any, keys: Any, values: Any) -> Any:
        return gpu_attention.mha(
            q, keys, values, segment_ids=None, sm_scale=s.head_width**-0.5, causal=True
        )

    return Case(function, (x, x, x))
