"""The sampler against its definitions in float64, and its promises about rows and memory."""

from dataclasses import replace
from itertools import pairwise

import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings

from pallasite.engine.request import SamplingParams
from pallasite.engine.sampler import (
    NONE_ALLOWED,
    NOT_FINITE,
    OK,
    SamplingRows,
    kept_weights,
    sample,
)
from pallasite.engine.sampler_state import edit_slot, has_bias, init_state, slot_edits
from tests.engine import sampler_oracle as oracle
from tests.engine.neutral_rows import neutral_rows

V = 257
W = 3
jitted_sample = jax.jit(sample)
jitted_edit = jax.jit(edit_slot)


def rows_of(params: list[SamplingParams], **arrays) -> SamplingRows:
    """The rows that a batch builder makes of these parameters, in slots 0, 1, ..."""
    rows = neutral_rows(len(params), W)
    for i, each in enumerate(params):
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(rows, name)[i] = getattr(each, name)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            getattr(rows, name)[i] = getattr(each, name)
        rows.seed[i] = np.uint32(each.seed or 0).view(np.int32)
        rows.slot[i] = i
        rows.has_bias[i] = has_bias(each)
        rows.num_logprobs[i] = -1 if each.logprobs is None else each.logprobs
    return replace(rows, **{name: np.asarray(value) for name, value in arrays.items()})


def random_logits(rng, num_rows, vocab_size=V):
    return (rng.standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)


def run(logits, rows, state=None, is_live=None):
    """Samples, and returns everything as numpy."""
    state = init_state(len(logits), logits.shape[1]) if state is None else state
    is_live = np.ones(len(logits), np.bool_) if is_live is None else np.asarray(is_live)
    return jax.device_get(jitted_sample(jnp.asarray(logits), rows, state, is_live))


@jax.jit
def kept_mask(logits, rows):
    return kept_weights(logits, jnp.max(logits, axis=1), rows, rows.temperature > 0) > 0


def assert_masks_agree(logits, params, most_at_an_edge):
    """Compares what is kept token by token, where no token lies on a cut as f32 has it."""
    got = kept_mask(logits, rows_of(params))
    num_edges = 0
    for x, each, mask in zip(logits.astype(np.float64), params, np.asarray(got), strict=True):
        slacks = (-oracle.EDGE, 0.0, oracle.EDGE)
        # No draw can reach a token whose weight is below what f32 holds.
        weighs = (x - x.max()) / each.temperature > -87.0
        mask = np.where(weighs, mask, False)
        least, exact, most = (oracle.kept(x, each, slack) & weighs for slack in slacks)
        if (least == most).all():
            np.testing.assert_array_equal(mask, exact, err_msg=str(each))
        else:
            num_edges += 1
            assert (least <= mask).all(), each
            assert (mask <= most).all(), each
    assert num_edges <= most_at_an_edge


def chi_square_bound(num_cells):
    """Six standard deviations above the mean of chi-square: exceeded once in about 10**7."""
    return num_cells + 6 * np.sqrt(2 * num_cells) + 20


def chi_square(token_ids, probabilities):
    expected = probabilities * len(token_ids)
    observed = np.bincount(token_ids, minlength=len(probabilities))
    assert observed[expected == 0].sum() == 0
    assert expected[expected > 0].min() > 5
    return (((observed - expected) ** 2)[expected > 0] / expected[expected > 0]).sum()


# What is kept.


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5])
@pytest.mark.parametrize(
    "cuts",
    [{"top_k": k} for k in (1, 2, 50, V - 1, V, V + 9)]
    + [{"top_p": p} for p in (1e-6, 0.1, 0.5, 0.9, 0.99, 1.0)]
    + [{"min_p": p} for p in (0.001, 0.1, 0.9, 1.0)]
    + [{"top_k": 20, "top_p": 0.8}, {"top_k": 5, "top_p": 0.5, "min_p": 0.2}],
    ids=str,
)
def test_kept_tokens_are_those_of_the_definition(rng, temperature, cuts):
    params = [SamplingParams(temperature=temperature, **cuts)] * 16
    assert_masks_agree(random_logits(rng, 16), params, most_at_an_edge=2)


def test_kept_tokens_of_a_real_vocabulary(rng):
    choices = [{"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 1000, "top_p": 0.95}]
    params = [SamplingParams(temperature=0.8, **cuts) for cuts in choices]
    assert_masks_agree(random_logits(rng, 4, 49152), params, most_at_an_edge=2)


def test_ties_at_an_edge_are_kept():
    logits = np.tile(np.float32([1, 3, 2, 2, 0, 2, -1, -1]), (3, 1))
    params = [SamplingParams(top_k=2), SamplingParams(top_p=0.6), SamplingParams(top_k=1)]
    masks = np.asarray(kept_mask(logits, rows_of(params)))
    # Of 40.6 in all, 20.1 belongs to token 1 and 7.4 to each of 2, 3 and 5.
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[1, 2, 3, 5], [1, 2, 3, 5], [1]]


def test_top_k_tells_logits_apart_that_the_temperature_makes_equal():
    one = np.float32(1)
    logits = np.stack([[one, np.nextafter(one, np.float32(2)), 0, -5]])
    params = [SamplingParams(top_k=1, temperature=1e6)]
    assert np.flatnonzero(kept_mask(logits, rows_of(params))[0]).tolist() == [1]


@pytest.mark.parametrize("logits", [[0.0, -0.0, 0.0, -1.0], [-3e38, 3e38, 0.0, 1e-38]], ids=str)
def test_signed_zeros_and_extreme_logits_have_their_place(logits):
    masks = kept_mask(
        np.tile(np.float32(logits), (4, 1)), rows_of([SamplingParams(top_k=k) for k in range(1, 5)])
    )
    for k, mask in enumerate(np.asarray(masks), start=1):
        x = np.float32(logits)
        expected = (x >= np.sort(x)[-k]) & (np.exp(x.astype(np.float64) - x.max()) > 0)
        np.testing.assert_array_equal(mask, expected)


# What is drawn.


@pytest.mark.parametrize("varied", ["seed", "output_index"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=3.0, top_p=0.7),
        SamplingParams(top_k=4, min_p=0.05),
    ],
    ids=["plain", "cold", "nucleus", "top_k and min_p"],
)
def test_draws_follow_the_distribution(rng, params, varied):
    num_draws = 20_000
    logits = rng.uniform(-1.5, 1.5, 24).astype(np.float32)
    start = int(rng.integers(2**30))
    draws = np.arange(start, start + num_draws, dtype=np.int32)
    rows = rows_of([params] * num_draws, **{varied: draws}, slot=np.zeros(num_draws, np.int32))
    _, sampled = run(np.tile(logits, (num_draws, 1)), rows, init_state(1, 24))

    expected = oracle.probabilities(logits.astype(np.float64), params)
    bound = chi_square_bound((expected > 0).sum())
    assert chi_square(sampled.token_ids, expected) < bound
    # The bound would notice every second token being 12% too frequent and the others too rare.
    other = expected.copy()
    kept = np.flatnonzero(expected)
    other[kept[::2]] *= 1.12
    other[kept[1::2]] *= 0.88
    assert chi_square(sampled.token_ids, other / other.sum()) > bound


def test_successive_draws_are_independent(rng):
    """Pairs of draws at successive indices, and at successive seeds, are uniform over pairs."""
    num_draws, vocab_size = 20_001, 8
    series = np.arange(num_draws, dtype=np.int32)
    for varied in ("seed", "output_index"):
        rows = rows_of([SamplingParams()] * num_draws, **{varied: series})
        rows = replace(rows, slot=np.zeros(num_draws, np.int32))
        logits = np.zeros((num_draws, vocab_size), np.float32)
        _, sampled = run(logits, rows, init_state(1, vocab_size))
        pairs = np.asarray([a * vocab_size + b for a, b in pairwise(sampled.token_ids.tolist())])
        uniform = np.full(vocab_size**2, vocab_size**-2.0)
        assert chi_square(pairs, uniform) < chi_square_bound(vocab_size**2)


def test_the_generator_is_threefry():
    """The published answer for key 0, counter 0; other words against JAX's own."""
    assert oracle.random_words(0, 0, 1).tolist() == [0x6B200159]
    words = oracle.random_words(7, 0xFFFFFFFF, 5).tolist()
    key = jnp.asarray([7, 0xFFFFFFFF], jnp.uint32)
    counters = jnp.asarray([0, 1, 2, 3, 4, 0, 0, 0, 0, 0], jnp.uint32)
    assert jax.extend.random.threefry_2x32(key, counters)[:5].tolist() == words


def test_a_tiny_temperature_is_greedy_and_finite(rng):
    logits = random_logits(rng, 4)
    _, sampled = run(logits, rows_of([SamplingParams(temperature=1.2e-38)] * 4))
    np.testing.assert_array_equal(sampled.token_ids, logits.argmax(1))
    np.testing.assert_array_equal(sampled.status, [OK] * 4)


def test_greedy_takes_the_first_of_equals():
    logits = np.float32([[0, 5, 1, 5], [2, 2, 2, 2]])
    _, sampled = run(logits, rows_of([SamplingParams(temperature=0.0)] * 2))
    assert sampled.token_ids.tolist() == [1, 0]


# All of it together.

B = 3
CHUNK_LEN = 16
token_ids = st.integers(0, V - 1)

# Fields of SamplingParams, a prompt, a completion so far, and ban pairs (if_token, banned).
# Fields, since the type checker draws random numbers, which a strategy may not.
requests = st.tuples(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.3, 1.0, 5.0]),
            "top_k": st.sampled_from([0, 1, 7, V]),
            "top_p": st.sampled_from([1.0, 0.95, 0.4]),
            "min_p": st.sampled_from([0.0, 0.03, 0.5]),
            "repetition_penalty": st.sampled_from([1.0, 1.3, 0.6]),
            "presence_penalty": st.sampled_from([-1.5, 0.0, 0.3, 2.0]),
            "frequency_penalty": st.sampled_from([-1.5, 0.0, 0.3, 2.0]),
            "logit_bias": st.just({})
            | st.dictionaries(token_ids, st.floats(-20, 20, width=32), max_size=20),
            "allowed_token_ids": st.none()
            | st.lists(token_ids, min_size=30, max_size=60, unique=True).map(tuple),
            "seed": st.integers(0, 2**32 - 1),
            "logprobs": st.sampled_from([None, 0, 5]),
        }
    ),
    st.lists(token_ids, max_size=40),
    st.lists(token_ids, max_size=40),
    st.lists(st.tuples(st.sampled_from([-1, 3, 4]), token_ids), max_size=W),
)


@settings(max_examples=40)
@given(st.lists(requests, min_size=B, max_size=B), st.integers(0, 2**32 - 1))
@example(
    [
        ({"seed": 3}, [5], [5], []),
        ({"seed": 3, "logit_bias": {8: 1.0}}, [5], [5], []),
        ({"seed": 3, "presence_penalty": 9.0}, [5], list(range(200)), []),
    ],
    2,
)
@example([({"top_k": 1, "allowed_token_ids": (5,), "seed": 1}, [5], [5, 5], [(-1, 6)])] * B, 0)
def test_any_mix_samples_what_the_definitions_say(asked, logits_seed):
    asked = [(SamplingParams(**fields), *rest) for fields, *rest in asked]
    logits = random_logits(np.random.default_rng(logits_seed), B)
    # What earlier requests left in the slots must not show.
    state = init_state(B, V)
    bias = state.bias.at[:, 0].set(90.0)
    state = replace(state, counts=state.counts + 9, is_seen=~state.is_seen, bias=bias)
    rows = rows_of([params for params, *_ in asked], last_token=np.full(B, 3, np.int32))
    for i, (params, prompt_ids, output_ids, bans) in enumerate(asked):
        rows.output_index[i] = len(output_ids)
        rows.bans[i, : len(bans)] = np.asarray(bans, np.int32).reshape(-1, 2)
        for edit in slot_edits(params, prompt_ids, output_ids, i, CHUNK_LEN):
            state = jitted_edit(state, edit)
    new_state, sampled = run(logits, rows, state)

    for i, (params, prompt_ids, output_ids, bans) in enumerate(asked):
        banned = [token_id for if_token, token_id in bans if if_token in (-1, 3)]
        x = oracle.processed(logits[i], params, prompt_ids, output_ids, banned)
        noise = oracle.exponential_noise(params.seed, len(output_ids), V)
        assert sampled.status[i] == OK
        assert int(sampled.token_ids[i]) in oracle.possible_tokens(x, params, noise)
        if params.logprobs is not None:
            expected = oracle.log_softmax(logits[i])[sampled.token_ids[i]]
            np.testing.assert_allclose(sampled.logprob[i], expected, atol=2e-5)
    np.testing.assert_array_equal(new_state.last_token, sampled.token_ids)


def test_a_request_draws_the_same_tokens_in_any_row_of_any_batch(rng):
    probe = SamplingParams(
        temperature=0.9, top_k=60, top_p=0.9, seed=2**32 - 5, repetition_penalty=1.2
    )
    logits = random_logits(rng, 1)[0] * np.float32(0.3)
    drawn = set()
    for num_rows in (1, 2, 5, 16):
        for row in {0, num_rows // 2, num_rows - 1}:
            others = [
                SamplingParams(
                    temperature=float(rng.choice([0.0, 0.5, 2.0])),
                    top_p=float(rng.uniform(0.1, 1.0)),
                    top_k=int(rng.integers(0, 9)),
                    frequency_penalty=float(rng.choice([0.0, 0.7])),
                    seed=int(rng.integers(2**32)),
                    logprobs=int(rng.integers(0, 20)),
                )
                for _ in range(num_rows)
            ]
            batch = random_logits(rng, num_rows)
            others[row], batch[row] = probe, logits
            state = init_state(num_rows, V)
            for edit in slot_edits(probe, [1, 2, 3], [4, 4], row, CHUNK_LEN):
                state = jitted_edit(state, edit)
            for index in range(20):
                rows = rows_of(others, output_index=np.full(num_rows, index, np.int32))
                _, sampled = run(batch, rows, state)
                drawn.add((index, int(sampled.token_ids[row])))
    assert len(drawn) == 20
    assert len({token_id for _, token_id in drawn}) > 5


# What cannot be sampled, and rows that are not live.


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_row_of_bad_logits_says_so_and_harms_no_other(rng, bad, temperature):
    logits = random_logits(rng, 3)
    params = [SamplingParams(temperature=temperature, top_k=9, top_p=0.9, seed=i) for i in range(3)]
    _, alone = run(logits, rows_of(params))
    logits[1, 100] = bad
    _, sampled = run(logits, rows_of(params))
    assert sampled.status.tolist() == [OK, NOT_FINITE, OK]
    assert sampled.token_ids.tolist() == [alone.token_ids[0], 0, alone.token_ids[2]]


def test_a_ban_does_not_hide_a_nan(rng):
    logits = random_logits(rng, 1)
    logits[0, 8] = np.nan
    rows = rows_of([SamplingParams()], bans=np.int32([[[-1, 8]]]))
    assert run(logits, rows)[1].status.tolist() == [NOT_FINITE]


def test_a_penalty_that_overflows_is_not_finite():
    logits = np.full((1, 8), 1e38, np.float32)
    params = SamplingParams(repetition_penalty=0.001)
    state = init_state(1, 8)
    for edit in slot_edits(params, [2], [], 0, CHUNK_LEN):
        state = jitted_edit(state, edit)
    assert run(logits, rows_of([params]), state)[1].status.tolist() == [NOT_FINITE]


def test_logits_of_minus_infinity_are_never_sampled(rng):
    logits = random_logits(rng, 64)
    logits[:, 10:] = -np.inf
    params = [SamplingParams(temperature=50.0, seed=i) for i in range(64)]
    _, sampled = run(logits, rows_of(params))
    assert sampled.status.tolist() == [OK] * 64
    assert sampled.token_ids.max() < 10
    assert len(set(sampled.token_ids.tolist())) > 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_allowed_says_so(rng, temperature):
    params = SamplingParams(temperature=temperature, allowed_token_ids=(3, 200))
    state = init_state(1, V)
    for edit in slot_edits(params, [1], [], 0, CHUNK_LEN):
        state = jitted_edit(state, edit)
    logits = random_logits(rng, 1)
    for banned, status in ((3, OK), (200, NONE_ALLOWED)):
        bans = np.int32([[[-1, 3], [-1, banned], [9, 0]]])
        _, sampled = run(logits, rows_of([params], bans=bans), state)
        assert sampled.status.tolist() == [status]
        assert sampled.token_ids.tolist() == [200 if status == OK else 0]


def test_rows_that_are_not_live_change_nothing(rng):
    logits = random_logits(rng, 4)
    logits[2] = np.nan
    rows = rows_of([SamplingParams(temperature=0.0)] * 4, slot=np.int32([5, 1, 1, 99]))
    state = replace(init_state(6, V), last_token=jnp.arange(70, 76, dtype=jnp.int32))
    new_state, sampled = run(logits, rows, state, [True, True, False, False])
    first, second = logits[:2].argmax(1).tolist()
    assert new_state.last_token.tolist() == [70, second, 72, 73, 74, first]
    assert sampled.status.tolist() == [OK] * 4
