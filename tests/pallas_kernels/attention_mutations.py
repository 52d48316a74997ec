"""Faults of the paged attention op's bodies that their tests must see.

    python -m tests.pallas_kernels.attention_mutations [WORD]

makes all of them, or those that have the word in their name or file, and says of each whether it
was seen. The table of each body is by itself; a body that comes adds its own here.
"""

import sys

from tests.pallas_kernels.attention_mutations_gpu import GPU
from tests.pallas_kernels.attention_mutations_tpu import TPU
from tests.pallas_kernels.mutations import Mutation, main

_TESTS = ("tests/pallas_kernels/test_paged_attention.py", "-k", "reference")


def _reference(name: str, old: str, new: str) -> Mutation:
    file = "paged_attention/reference.py"
    return Mutation(name=name, file=file, old=old, new=new, tests=_TESTS)


REFERENCE = (
    _reference(
        "decode misses its own token",
        "visible = (s[None] < kv_lens[:, None])",
        "visible = (s[None] < kv_lens[:, None] - 1)",
    ),
    _reference(
        "decode sees the next row",
        "visible = (s[None] < kv_lens[:, None])",
        "visible = (s[None] <= kv_lens[:, None])",
    ),
    _reference(
        "prefill misses its own token",
        "s[None] <= positions[:, None]",
        "s[None] < positions[:, None]",
    ),
    _reference(
        "prefill sees the next token",
        "s[None] <= positions[:, None]",
        "s[None] <= positions[:, None] + 1",
    ),
    _reference("window one wider", "positions - self.window + 1", "positions - self.window"),
    _reference("window one narrower", "positions - self.window + 1", "positions - self.window + 2"),
    _reference(
        "the first layer's window",
        "jnp.asarray(windows, jnp.int32)[layer]",
        "jnp.asarray(windows, jnp.int32)[0]",
    ),
    _reference(
        "no window in the decode",
        "kv_lens[:, None]) & (s[None] >= starts[:, None])",
        "kv_lens[:, None])",
    ),
    _reference(
        "the decode begins a block late", "first = jnp.min(starts)", "first = 1 + jnp.min(starts)"
    ),
    _reference(
        "the decode leaves out its last block",
        "end = -(-jnp.max(kv_lens) //",
        "end = (jnp.max(kv_lens) //",
    ),
    _reference(
        "the prefill begins a block late", "first = jnp.maximum(", "first = 1 + jnp.maximum("
    ),
    _reference(
        "the prefill leaves out its last block", "end = -(-jnp.minimum(", "end = (jnp.minimum("
    ),
    _reference(
        "the prefill begins with the second tile",
        "fori_loop(0, num_tiles",
        "fori_loop(1, num_tiles",
    ),
    _reference(
        "the prefill leaves out its first request",
        "fori_loop(ragged.num_decode, ragged",
        "fori_loop(ragged.num_decode + 1, ragged",
    ),
    _reference(
        "queries beyond a request's end see what nobody wrote",
        "jnp.minimum(positions, kv_len - 1)",
        "positions",
    ),
    _reference(
        "queries are not scaled", "q.astype(jnp.float32) * config.scale", "q.astype(jnp.float32)"
    ),
    _reference("no soft cap", "if self.soft_cap is None:", "if True:"),
    _reference(
        "scores are capped twice", "jnp.tanh(scores / self", "jnp.tanh(jnp.tanh(scores) / self"
    ),
    _reference("no sinks", "config.soft_cap, sinks)", "config.soft_cap, None)"),
    _reference("sinks without weight", "0.0 if sinks is None else 1.0", "0.0"),
    _reference("sinks of other heads", "sinks = sinks.astype", "sinks = sinks[::-1].astype"),
    _reference(
        "a page of another column",
        "start = (row, block * self.num_pages)",
        "start = (row, block * self.num_pages + 1)",
    ),
    _reference(
        "a page of another column, in the decode",
        "self.page_table, block * self.num_pages,",
        "self.page_table, block * self.num_pages + 1,",
    ),
    _reference(
        "a page of another layer",
        "held = self.cache.values[self.layer, pages]",
        "held = self.cache.values[0, pages]",
    ),
    _reference("values without scales", "v * scales[..., 1, :, :]", "v"),
    _reference("keys with values' scales", "k * scales[..., 0, :, :]", "k * scales[..., 1, :, :]"),
    _reference(
        "the decode's values are not masked",
        "v = jnp.where(visible[:, None, :, None], v, 0.0)",
        "v = v + 0.0",
    ),
    _reference(
        "the prefill's values are not masked",
        "v = jnp.where((s < kv_len)[None, :, None], v, 0.0)",
        "v = v + 0.0",
    ),
    _reference("sums of blocks are not shrunk", "self.total * shrink +", "self.total +"),
    _reference(
        "values of blocks are not shrunk", "self.weighted * shrink[..., None] +", "self.weighted +"
    ),
    _reference(
        "rows are written a row late",
        "ragged.positions % cache.page_size)",
        "(ragged.positions + 1) % cache.page_size)",
    ),
    _reference(
        "rows are written to another layer", "place = (layer, page,", "place = (0 * layer, page,"
    ),
    _reference(
        "rows are written to another page",
        "ragged.positions // cache.page_size]",
        "ragged.positions // cache.page_size] + 1",
    ),
    _reference("padding is written", "(token < ragged.query_starts[-1]) & ", ""),
    _reference("negative page ids count from the end", " & (page >= 0)", ""),
    Mutation(
        tests=_TESTS,
        name="values lie where keys do",
        file="paged_attention/rows.py",
        old="value_start = rows.shape[-1] // 2 if rows.shape[-3] == 1 else 0",
        new="value_start = 0",
    ),
    Mutation(
        tests=_TESTS,
        name="values lie behind keys without room",
        file="paged_attention/rows.py",
        old="rows.shape[-1] // 2 if",
        new="head_width if",
    ),
    Mutation(
        tests=_TESTS,
        name="rows are padded with ones",
        file="paged_attention/rows.py",
        old="((0, surplus),))",
        new="((0, surplus),), constant_values=1)",
    ),
    Mutation(
        tests=_TESTS,
        name="int8 is truncated",
        file="storage.py",
        old="jnp.round(rows)",
        new="jnp.trunc(rows)",
    ),
    Mutation(
        tests=_TESTS,
        name="fp8 is rounded as int8 is",
        file="storage.py",
        old="if jnp.dtype(held_as) == jnp.int8:",
        new="if True:",
    ),
    Mutation(tests=_TESTS, name="half of fp8's range", file="storage.py", old="448}", new="224}"),
)

MUTATIONS = (*REFERENCE, *GPU, *TPU)

if __name__ == "__main__":
    sys.exit(main(MUTATIONS, *sys.argv[1:]))
