"""The paged attention op of a serving step, to be compiled for any target by `compile_for`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallasite.pallas_kernels.compile import Case
from pallasite.pallas_kernels.paged_attention import (
    AttentionConfig,
    PagedCache,
    Ragged,
    paged_attention,
)
from pallasite.pallas_kernels.target import Target

NUM_LAYERS = 8


def step(
    target: Target,
    *,
    held_as: str = "bfloat16",
    head_width: int = 128,
    num_tokens: int = 2048,
    num_rows: int = 64,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    max_len: int = 8192,
    num_pages: int = 18432,
    variant: str = "plain",
) -> Case:
    """Attention of one layer, queries given in f32.

    The shapes are Llama 3 8B's, with few layers, beside a cache of more than 4 GiB whatever it
    holds. The variant "all" has windows in every other layer, a soft cap and sinks.
    """
    has_all = variant == "all"
    config = AttentionConfig(
        scale=head_width**-0.5,
        windows=(None, 1024) * (NUM_LAYERS // 2) if has_all else (),
        soft_cap=50.0 if has_all else None,
        target=target,
    )
    R, W = target.cache_row(head_width)
    values = _struct(
        (NUM_LAYERS, num_pages, num_kv_heads, R, target.page_size, W), jnp.dtype(held_as)
    )
    scales = _struct((*values.shape[:3], 2, target.page_size), jnp.float32)
    cache = PagedCache(values=values, scales=scales if values.dtype.itemsize == 1 else None)
    batch = {
        "positions": _ints(num_tokens),
        "kv_lens": _ints(num_rows),
        "query_starts": _ints(num_rows + 1),
        "page_table": _ints(num_rows, -(-max_len // target.page_size)),
        "num_requests": _ints(),
        "num_decode": _ints(),
    }
    q = _struct((num_tokens, num_heads, head_width), jnp.float32)
    kv_new = _struct((num_tokens, num_kv_heads, 2, head_width), jnp.float32)
    sinks = _struct((num_heads,), jnp.float32) if has_all else None

    def function(
        q: jax.Array,
        kv_new: jax.Array,
        cache: PagedCache,
        layer: jax.Array,
        batch: dict[str, jax.Array],
        sinks: jax.Array | None,
    ) -> tuple[jax.Array, PagedCache]:
        return paged_attention(q, kv_new, cache, layer, Ragged(**batch), config, sinks)

    return Case(function, (q, kv_new, cache, _ints(), batch, sinks), donated=(2,))


def layers(target: Target, *, num_devices: int = 4, **options: Any) -> Case:
    """`step` as a model has it: in a loop over layers, heads and cache shared out to devices."""
    one = step(target, **options)
    q, kv_new, cache, _, batch, _ = one.arguments
    mesh = jax.sharding.AbstractMesh((num_devices,), ("model",))
    heads, cached = P(None, "model"), P(None, None, "model")

    def place(tree: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    def part(
        q: jax.Array, kv_new: jax.Array, cache: PagedCache, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, PagedCache]:
        def layer(
            index: jax.Array, carry: tuple[jax.Array, PagedCache]
        ) -> tuple[jax.Array, PagedCache]:
            x, cache = carry
            return one.function(x, kv_new, cache, index, batch, None)

        return jax.lax.fori_loop(0, NUM_LAYERS, layer, (q, cache))

    function = jax.shard_map(
        part, in_specs=(heads, heads, cached, P()), out_specs=(heads, cached), check_vma=False
    )
    arguments = (place(q, heads), place(kv_new, heads), place(cache, cached), place(batch, P()))
    return Case(function, arguments, donated=(2,), mesh=mesh)


def cache_bytes(case: Case) -> int:
    """Returns how large the cache is that the program updates in place."""
    leaves = jax.tree.leaves(case.arguments[2])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _struct(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return _struct(shape, jnp.int32)
