"""Faults of the GPU's body of the paged attention op, see `attention_mutations.py`.

Its tests are slow, so each fault names words of the settings that must see it. The interpreter
drops what is written beyond an array's end, so no test on a CPU can see that.
"""

from tests.pallas_kernels.mutations import Mutation


def _block(name: str, old: str, new: str, words: str = "T5") -> Mutation:
    return _in("block", name, old, new, words)


def _decode(name: str, old: str, new: str, words: str = "T5") -> Mutation:
    return _in("decode", name, old, new, words)


def _prefill(name: str, old: str, new: str, words: str = "alone and G4 and T150") -> Mutation:
    return _in("prefill", name, old, new, words)


def _write(name: str, old: str, new: str, words: str = "T5") -> Mutation:
    return _in("write", name, old, new, words)


def _in(file: str, name: str, old: str, new: str, words: str) -> Mutation:
    path = f"paged_attention/gpu_{file}.py"
    tests = ("tests/pallas_kernels/test_paged_attention.py", "-k", f"GPU and {words}")
    return Mutation(name=name, file=path, old=old, new=new, tests=tests)


GPU = (
    _block("queries are not scaled", ".astype(jnp.float32) * curve.factor", ".astype(jnp.float32)"),
    _block("no soft cap", "if curve.cap is not None:", "if False:", "T5 and cap"),
    _block("no sinks", "if sinks is not None:", "if False:", "T5 and sinks"),
    _block(
        "sinks are natural logarithms",
        "sinks.astype(jnp.float32) * math.log2(math.e)",
        "sinks",
        "T5 and sinks",
    ),
    _block("keys without scales", "if block.k_scales is not None:", "if False:", "T5 and int8"),
    _block("values without scales", "if block.v_scales is not None:", "if False:", "T5 and int8"),
    _block(
        "keys with values' scales", "scales(0), scales(1)", "scales(1), scales(1)", "T5 and int8"
    ),
    _block("keys for values", "Block(rows(0), rows(1)", "Block(rows(0), rows(0)"),
    _block(
        "window one wider",
        "jnp.minimum(window, position + 1) + 1",
        "jnp.minimum(window, position)",
        "T5 and 100-None",
    ),
    _block(
        "window one narrower",
        "jnp.minimum(window, position + 1) + 1",
        "jnp.minimum(window, position + 1) + 2",
        "T5 and 100-None",
    ),
    _block(
        "the first layer's window",
        "self.windows[self.layer[0]]",
        "self.windows[0]",
        "T5 and 100-None",
    ),
    _block(
        "the first layer's rows", "at = (inputs.layer[0], page[:, None]", "at = (0, page[:, None]"
    ),
    _block(
        "the first layer's scales",
        "at = (inputs.layer[0], page, ",
        "at = (0, page, ",
        "T5 and int8",
    ),
    _block(
        "a page of another column, by one look-up",
        "inputs.page_table[self.row, start // page_size]",
        "inputs.page_table[self.row, start // page_size - 1]",
        "T5 and page32",
    ),
    _block(
        "a page of another column, token by token",
        "self.row, position // page_size]",
        "self.row, position // page_size - 1]",
        "T5 and page16",
    ),
    _block(
        "the next row of the page",
        "slot = position % page_size",
        "slot = (position + 1) % page_size",
    ),
    _block(
        "what is not visible is read",
        "held = load(inputs.values.at[at], mask)",
        "held = load(inputs.values.at[at], within(column, width))",
    ),
    _block(
        "sums of blocks are not shrunk", "self.total * shrink + jnp.sum", "self.total + jnp.sum"
    ),
    _block(
        "values of blocks are not shrunk",
        "self.weighted * shrink[:, None] + added",
        "self.weighted + added",
    ),
    _block("queries of no tokens are divided by 0", "jnp.where(total == 0.0, 1.0, total)", "total"),
    _decode("decode misses its own token", "(position < kv_len) &", "(position < kv_len - 1) &"),
    _decode("decode sees the next row", "(position < kv_len) &", "(position <= kv_len) &"),
    _decode("no window in the decode", " & (position >= first_visible)", "", "T5 and 100-None"),
    _decode(
        "the decode begins a block late",
        "first = inputs.first_visible(kv_len - 1) // self.block_tokens",
        "first = 1 + inputs.first_visible(kv_len - 1) // self.block_tokens",
    ),
    _decode(
        "the decode leaves out its last block",
        "end = pl.cdiv(kv_len, self.block_tokens)",
        "end = kv_len // self.block_tokens",
    ),
    _decode(
        "splits overlap",
        "end = jnp.minimum(start + per_split, end)",
        "end = jnp.minimum(start + per_split + 1, end)",
        "T5 and len700",
    ),
    _decode(
        "a block between splits is lost",
        "start = first + split * per_split",
        "start = first + split * (per_split + 1)",
        "T5 and len700",
    ),
    _decode(
        "splits weigh the same",
        "shares = jnp.exp2(tops - top)",
        "shares = jnp.exp2(0 * tops)",
        "T5 and len700",
    ),
    _decode(
        "the last split is lost",
        "(first + split * per_split < end)",
        "(first + (split + 1) * per_split < end)",
        "T5 and len700",
    ),
    _decode(
        "rows without a request stay as they were",
        "fills_rest=num_tokens == num_rows",
        "fills_rest=False",
        "T5",
    ),
    _decode(
        "queries of another head",
        "query = head * inputs.heads_per_key + group",
        "query = head + group",
        "T5 and K3",
    ),
    _prefill(
        "prefill misses its own token", "visible = at[None, :] <= ", "visible = at[None, :] < "
    ),
    _prefill(
        "prefill sees the next token",
        "jnp.minimum(position, last)[:, None]",
        "jnp.minimum(position + 1, last)[:, None]",
    ),
    _prefill(
        "no window in the prefill",
        "visible = visible & (at[None, :] >= starts[:, None])",
        "pass",
        "alone and T150 and 100-None",
    ),
    _prefill(
        "the prefill begins a block late",
        "first = inputs.first_visible(tile.position) // size",
        "first = 1 + inputs.first_visible(tile.position) // size",
    ),
    _prefill(
        "the prefill leaves out its last block",
        "end = pl.cdiv(last + 1, size)",
        "end = last // size",
    ),
    _prefill(
        "a block at the diagonal is taken whole",
        "jnp.maximum((tile.position + 1) // size, first_whole)",
        "jnp.maximum(tile.position // size + 1, first_whole)",
    ),
    _prefill(
        "a block at the window's start is taken whole",
        "pl.cdiv(inputs.first_visible(last), size)",
        "(inputs.first_visible(last) // size)",
        "alone and T150 and 37-74",
    ),
    _prefill(
        "tokens beyond the last stay as they were", "is_request | (row == num_rows)", "is_request"
    ),
    _prefill(
        "a tile too few",
        "num_tokens // plan.num_queries + num_rows + 1",
        "num_tokens // plan.num_queries",
    ),
    _prefill(
        "a request's last tile is lost",
        "pl.cdiv(lens, plan.num_queries)",
        "(lens // plan.num_queries)",
    ),
    _prefill(
        "tiles reach into the next request",
        "jnp.minimum(tile.num_tokens, plan.num_queries)",
        "plan.num_queries",
    ),
    _write(
        "rows are written a row late",
        "slot = position % page_size",
        "slot = (position + 1) % page_size",
    ),
    _write("rows are written to the first layer", "layer = inputs.layer[0]", "layer = 0"),
    _write(
        "keys and values change places",
        "place = out.values.at[layer, page, head[:, None], which[:, None]",
        "place = out.values.at[layer, page, head[:, None], 1 - which[:, None]",
    ),
    _write("padding is written", "pl.when(is_live & ", "pl.when(", "decode_and_prefill and K3-G4"),
    _write("page ids below 0 are written", " & (page >= 0)", "", "T5 and none"),
    _write(
        "scales are not written", "if inputs.row_scales is not None:", "if False:", "T5 and int8"
    ),
)
