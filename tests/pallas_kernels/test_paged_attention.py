"""The paged attention op against dense float64 attention: one test for all bodies.

What is tested with what is a table, `attention_bodies.py`; how batches are made, what they are
poisoned with and what outputs are held to, `attention_cases.py`. Caches are compared bit by bit.

That these tests can fail is checked in two ways. `test_a_wrong_attention_is_seen` holds wrong
answers to the tolerances. And `python -m tests.pallas_kernels.attention_mutations` breaks the
bodies themselves, one fault at a time, and says which test saw it, in half a minute or so a fault.
Among them are causal masks off by one, pages that are dropped, values without their scales, copies
that are not waited for, and tiles that are overwritten on their way. When they were last made, all
were seen: 41 in the reference, 48 in the GPU's kernels, 30 in the TPU's, two of which make a
test wait for what never comes.
"""

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.pallas_kernels.paged_attention import PagedCache
from tests.pallas_kernels import attention_oracle as oracle
from tests.pallas_kernels import mutations
from tests.pallas_kernels.attention_bodies import BODIES, REFERENCE
from tests.pallas_kernels.attention_cases import (
    BFLOAT16,
    FLOAT32,
    FP8,
    INT8,
    Case,
    Setting,
    decode_batches,
    mixed_batches,
    on_device,
    prefill_batches,
)
from tests.pallas_kernels.attention_mutations import MUTATIONS

ALL = [(body, setting) for body in BODIES for setting in body.settings]
RAGGED = [(body, setting) for body, setting in ALL if not setting.is_decode]


def each(cases):
    return pytest.mark.parametrize(
        ("body", "setting"), [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in cases]
    )


@pytest.fixture(autouse=True)
def _no_races(capfd):
    """The interpreter that looks for races prints what it finds."""
    yield
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def check(body, setting, batches, examples):
    """Runs the body on the batches that a strategy makes, and on these examples."""

    @given(batch=batches, wanted=st.integers(0, 6), seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=body.num_examples)
    def run(batch, wanted, seed):
        Case(body, setting, *batch, wanted, seed).check()

    for seed, (lens, num_decode, wanted) in enumerate(examples):
        run = example(batch=(lens, num_decode), wanted=wanted, seed=seed)(run)
    run()


@each(ALL)
def test_decode_alone(body, setting):
    B, most, page = setting.B, setting.max_len, setting.page
    edges = [most, page + 1, page, 2, 1][:B]
    examples = [
        ([], 0, 0),
        ([(1, 1)], 1, 0),
        ([(1, n) for n in edges], len(edges), 0),
        ([(1, most)] * B, B, 6),
    ]
    check(body, setting, decode_batches(setting), examples)


@each(RAGGED)
def test_prefill_alone(body, setting):
    T, most, page = setting.T, setting.max_len, setting.page
    full = min(T, most)
    examples = [
        ([(1, 1)], 0, 0),
        ([(full, full)], 0, 0),
        ([(full, most)], 0, 0),
        ([(0, 7), (full, full)], 0, 0),
        ([(0, 1), (0, most)], 0, 0),
        ([(T // 2, most), (1, most), (T // 3, most - 1)], 0, 6),
        ([(min(page, T // 3), page), (1, page + 1), (T // 3, T // 3)], 0, 0),
    ]
    # The first query of a whole tile sees all of a block but its last position.
    edges = (page, 2 * page, 4 * page, 8 * page)
    examples += [([(full, n - 2 + full)], 0, 0) for n in edges if n - 2 + full <= most]
    # The last of a tile of 128 queries sees all of a block but its first position; in each layer.
    for window in setting.windows:
        if window is not None and T >= 128 and full <= window - 127 + full <= most:
            examples += 2 * [([(full, window - 127 + full)], 0, 0)]
    check(body, setting, prefill_batches(setting), examples)


@each(RAGGED)
def test_decode_and_prefill(body, setting):
    T, most, page = setting.T, setting.max_len, setting.page
    examples = [
        ([(1, most), (T - 1, most)], 1, 0),
        ([(1, page + 1), (1, most), (T // 2, most)], 2, 6),
        ([(1, most - 1), (0, 1), (1, 1)], 1, 0),
        # Every row is in use, the last one too, and tokens are left.
        ([(1, page)] * (setting.B - 1) + [(2, 3)], setting.B - 1, 0),
    ]
    check(body, setting, mixed_batches(setting), examples)


@each(ALL)
def test_a_page_that_is_none_is_not_written(body, setting):
    """Nor does anything else go wrong: the output is finite, and the other requests' is right."""
    page = setting.page
    new = [1] * 3 if setting.is_decode else [1, 1, min(page + 3, setting.T - 2)]
    lens = list(zip(new, [page + 1, page + 2, 2 * page], strict=True))
    for seed, wrong in enumerate([-1, setting.num_pages, -(2**31), 2**31 - 1]):
        case = Case(body, setting, lens, 3 if setting.is_decode else 2, seed=seed)
        lost, others = case.sequences[0], case.sequences[1:]
        case.sequences = [replace(lost, pages=(lost.pages[0], wrong)), *others]
        if body.refuses_pages:
            named = f"got page {wrong} of request 0; the cache has {setting.num_pages}"
            with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=named):
                case.call(fill=0)
            continue
        out, cache, after = case.call(fill=0)
        assert np.isfinite(out).all()
        expected = case.expected()
        body.assert_close(setting, out[1 : len(expected)], expected[1:])
        oracle.assert_same_bits(cache, after, case.free_rows())


@each([case for case in ALL if case[1].held_as in (FLOAT32, BFLOAT16)])
def test_what_nobody_wrote_may_be_infinite(body, setting):
    """Not only NaN: an infinite key makes an infinite score, which no comparison sorts out."""
    new = [1] * 3 if setting.is_decode else [1, 1, min(setting.page + 3, setting.T - 2)]
    lens = list(zip(new, [2, setting.page + 2, 2 * setting.page], strict=True))
    case = Case(body, setting, lens, 3 if setting.is_decode else 2, seed=11)
    for fill in (np.inf, 1e30):
        out, _, _ = case.call(fill)
        expected = case.expected()
        body.assert_close(setting, out[: len(expected)], expected)


@each([case for case in RAGGED if case[0] is REFERENCE and case[1].T > 100])
def test_chunks_of_a_prompt_give_what_one_pass_gives(body, setting):
    """A prompt in chunks of 1, 47, 63 and 39, each continuing the cache that the last one left."""
    whole = Case(body, setting, [(150, 150)], 0, seed=7)
    sequence = whole.sequences[0]
    sinks = None if whole.sinks is None else jnp.asarray(whole.sinks)
    cache = on_device(body.empty_cache(setting))
    outs = []
    start = 0
    for num_new in (1, 47, 63, 39):
        span = slice(start, start + num_new)
        pad = ((0, setting.T - num_new), (0, 0), (0, 0))
        chunk = replace(
            sequence,
            q=sequence.q[span],
            kv=sequence.kv[: span.stop],
            pages=sequence.pages[: -(-span.stop // setting.page)],
        )
        whole.sequences = [chunk]
        out, cache = body.run(
            setting,
            jnp.asarray(np.pad(sequence.q[span], pad).astype(setting.given_as)),
            jnp.asarray(np.pad(sequence.given[span], (*pad, (0, 0))).astype(setting.given_as)),
            cache,
            jnp.asarray(whole.layer, jnp.int32),
            whole.ragged(),
            sinks=sinks,
        )
        outs.append(np.asarray(out)[:num_new])
        start = span.stop
    whole.sequences = [sequence]
    body.assert_close(setting, np.concatenate(outs), whole.expected())
    _, in_one_pass, _ = whole.call()
    in_numpy = body.empty_cache(setting)
    in_numpy.values, in_numpy.scales = in_one_pass.values, in_one_pass.scales
    oracle.assert_same_bits(cache, in_numpy)


WRONG = {
    "sees the next": {"future": 1},
    "misses itself": {"future": -1},
    "window one wider": {"window": 75},
    "window one narrower": {"window": 73},
    "the other layer's window": {"window": 37},
    "no window": {"window": None},
    "no scale": {"scale": 1.0},
    "no soft cap": {"soft_cap": None},
    "no sinks": {"sinks": None},
    "sinks of other heads": {"sinks": lambda sinks: np.roll(sinks, 1)},
    "capped sinks": {"sinks": lambda sinks: 5 * np.tanh(sinks / 5)},
}


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_wrong_attention_is_seen(is_exact):
    """The tolerances, the wider one too, let none of the usual faults pass."""
    body = replace(REFERENCE, is_exact=is_exact)
    wide = Setting(
        **{"T": 150, "K": 2, "G": 2, "H": 64, "page": 4, "windows": (37, 74), "soft_cap": 5.0},
        **{"has_sinks": True, "held_as": FLOAT32, "given_as": BFLOAT16},
    )
    case = Case(body, wide, [(1, 200), (1, 100), (100, 150)], 2, seed=3)
    right = case.expected()
    assert is_close(body, wide, right, right)
    wrong = {
        name: case.expected(**{k: v(case.sinks) if callable(v) else v for k, v in change.items()})
        for name, change in WRONG.items()
    }
    wrong["one number"] = np.full_like(right, right.mean())
    wrong["values of no query's own"] = np.broadcast_to(right[:1], right.shape)
    wrong["the next token's"] = np.roll(right, 1, axis=0)
    wrong["the next head's"] = np.roll(right, 1, axis=1)
    wrong["one head's is lost"] = right * (np.arange(4)[:, None] != 2)
    sequences = case.sequences
    case.sequences = [
        s.without_page(len(s.pages) - 2, wide.page) if s.num_new == 1 else s for s in sequences
    ]
    wrong["a lost page"] = case.expected()
    for fault, values in wrong.items():
        assert not is_close(body, wide, values, right), fault
    if not is_exact:
        # What a kernel may do at most: 2^-9 of each row, and all of them the same way.
        assert is_close(body, wide, right * (1 + 2.0**-9), right)


def is_close(body, setting, ours, right):
    try:
        body.assert_close(setting, ours.astype(np.float32), right)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("held_as", [INT8, FP8], ids=str)
def test_wrong_scales_are_seen(held_as, is_exact):
    """A neighbour's scales, a key's for a value, one for all, or values that are not rounded."""
    body = replace(REFERENCE, is_exact=is_exact)
    setting = Setting(T=150, K=3, G=2, H=64, page=16, held_as=held_as)
    case = Case(body, setting, [(1, 200), (1, 30), (100, 150)], 2, seed=3)
    right, sequences = case.expected(), case.sequences

    def expected_with(change):
        case.sequences = []
        for s in sequences:
            rows, scales = oracle.held(s.given, held_as)
            kv = rows.astype(np.float32) * change(scales)[..., None]
            case.sequences.append(replace(s, kv=kv))
        return case.expected()

    np.testing.assert_array_equal(expected_with(lambda scales: scales), right)
    wrong = {
        "the scales of the row before": expected_with(lambda scales: np.roll(scales, 1, axis=0)),
        "another head's": expected_with(lambda scales: np.roll(scales, 1, axis=1)),
        "keys' for values and values' for keys": expected_with(lambda scales: scales[..., ::-1]),
        "one for all": expected_with(lambda scales: np.full_like(scales, scales.max())),
        "no scales of values": expected_with(
            lambda scales: np.stack([scales[..., 0], 0 * scales[..., 1] + 1], -1)
        ),
    }
    case.sequences = [replace(s, kv=s.given) for s in sequences]
    wrong["not rounded"] = case.expected()
    for fault, values in wrong.items():
        assert not is_close(body, setting, values, right), fault


def test_a_wrong_cache_is_seen():
    setting = Setting(T=5, K=2, G=1, H=16, page=16, held_as=INT8)
    case = Case(REFERENCE, setting, [(1, 20), (0, 7)], 1, seed=1)
    _, cache, after = case.call()
    free = case.free_rows()
    oracle.assert_same_bits(cache, after, free)
    assert free.sum() == 32 - 20  # and not those of the one that writes nothing
    own, other = case.sequences[0].pages[-1], case.sequences[1].pages[-1]
    for place in [
        (case.layer, own, 0, 0, 3, 0),  # its last row
        (1 - case.layer, own, 0, 0, 4, 0),
        (case.layer, other, 1, 1, 15, 5),
        (case.layer, setting.num_pages - 1, 1, 1, 15, 5),
    ]:
        for name in ("values", "scales"):
            changed = {"values": cache.values, "scales": cache.scales}
            at = place if name == "values" else place[:5]
            changed[name] = changed[name].at[at].set(jnp.asarray(3, changed[name].dtype))
            with pytest.raises(AssertionError, match=f"1 of the cache's {name} differ"):
                oracle.assert_same_bits(PagedCache(**changed), after, free)


def test_every_fault_can_be_made():
    """The table of faults keeps up with the bodies."""
    for mutation in MUTATIONS:
        assert mutation.applied() != (mutations.KERNELS / mutation.file).read_text()
