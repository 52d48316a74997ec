"""Every cap of the one validator: refused by the field's name, at once, and not one step too early.

What is refused is listed in bad_requests.py, which tests/reliability/ sends to an engine.
"""

import math
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallasite.engine import ErrorCode, Limits, RequestError
from pallasite.engine.validation import Bounds, validate
from tests.engine.bad_requests import HUGE, refused, request, with_params

VOCAB, CONTEXT = 320, 64
BOUNDS = Bounds(vocab_size=VOCAB, max_context_len=CONTEXT, num_cached_tokens=48, limits=Limits())


def ids(count):
    return tuple(range(count))


ALLOWED = {
    "the longest prompt": {"prompt_ids": (0,) * 44},
    "all that the cache holds": {"prompt_ids": (0,), **with_params(max_tokens=47)},
    "the largest id": {"prompt_ids": (VOCAB - 1,)},
    "the longest request id": {"request_id": "r" * 128},
    "the longest tenant": {"tenant": "é" * 128},
    "the lowest priority": {"priority": -(2**31)},
    "the highest priority": {"priority": 2**31 - 1},
    "a short time": {"timeout_s": 1e-9},
    "min_tokens": with_params(min_tokens=4),
    "n": with_params(n=16),
    "temperature": with_params(temperature=100.0),
    "temperature 0": with_params(temperature=0),
    "top_k": with_params(top_k=VOCAB),
    "top_p": with_params(top_p=1.0),
    "a small top_p": with_params(top_p=1e-30),
    "min_p 0": with_params(min_p=0.0),
    "min_p 1": with_params(min_p=1.0),
    "repetition_penalty": with_params(repetition_penalty=100.0),
    "a low repetition_penalty": with_params(repetition_penalty=0.01),
    "presence_penalty": with_params(presence_penalty=-100.0),
    "frequency_penalty": with_params(frequency_penalty=100.0),
    "the lowest seed": with_params(seed=-(2**63)),
    "the highest seed": with_params(seed=2**64 - 1),
    "logprobs": with_params(logprobs=20),
    "prompt_logprobs 0": with_params(prompt_logprobs=0),
    "logit_bias": with_params(logit_bias=dict.fromkeys(range(VOCAB), -1000.0)),
    "every id allowed": with_params(allowed_token_ids=ids(VOCAB)),
    "stop ids": with_params(stop_token_ids=ids(16)),
    "bad words": with_params(bad_words=(ids(16),) * 64),
    "one left of those allowed": with_params(allowed_token_ids=(1, 2), bad_words=((1,), (2, 1))),
}

REFUSED = refused(BOUNDS)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_just_within_its_cap_is_taken(name):
    validate(request(**ALLOWED[name]), BOUNDS)


@pytest.mark.parametrize(
    ("field", "fields"), REFUSED, ids=[f"{i}-{field}" for i, (field, _) in enumerate(REFUSED)]
)
def test_what_is_beyond_its_cap_is_refused_by_name(field, fields):
    with pytest.raises(RequestError) as caught:
        validate(request(**fields), BOUNDS)
    error = caught.value
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert error.field == field
    message = str(error)
    assert message.startswith(f"{field}: got ")
    assert "; allowed is " in message
    assert message.count("; ") >= 2, "what to change is said last"
    assert len(message) < 300


def test_the_caps_are_the_operators():
    limits = Limits(
        max_n=1,
        max_logprobs=0,
        max_stop_token_ids=0,
        max_logit_bias=1,
        max_bad_words=1,
        max_bad_word_len=2,
        max_request_id_len=3,
        max_tenant_len=4,
    )
    bounds = Bounds(vocab_size=VOCAB, max_context_len=64, num_cached_tokens=48, limits=limits)
    word = MappingProxyType({1: 0.0})
    within = with_params(logprobs=0, logit_bias=word, bad_words=((1, 2),))
    validate(request(request_id="abc", tenant="abcd", **within), bounds)
    beyond = [
        ("request_id", {"request_id": "abcd"}),
        ("tenant", {"tenant": "abcde"}),
        ("sampling.n", with_params(n=2)),
        ("sampling.logprobs", with_params(logprobs=1)),
        ("sampling.stop_token_ids", with_params(stop_token_ids=(1,))),
        ("sampling.logit_bias", with_params(logit_bias={1: 0.0, 2: 0.0})),
        ("sampling.bad_words", with_params(bad_words=((1,), (2,)))),
        ("sampling.bad_words", with_params(bad_words=((1, 2, 3),))),
    ]
    for field, fields in beyond:
        with pytest.raises(RequestError) as caught:
            validate(request(**fields), bounds)
        assert caught.value.field == field


_NUMBERS = st.one_of(st.floats(), st.integers(), st.sampled_from([HUGE, -HUGE]))
_IDS = st.lists(st.integers(-2, VOCAB + 1), max_size=20).map(tuple)


@given(
    prompt_ids=_IDS,
    temperature=_NUMBERS,
    top_p=_NUMBERS,
    presence_penalty=_NUMBERS,
    max_tokens=st.integers(),
    seed=st.none() | st.integers(),
    logit_bias=st.dictionaries(st.integers(), _NUMBERS, max_size=3),
    bad_words=st.lists(_IDS, max_size=3).map(tuple),
)
def test_no_request_of_whatever_values_gets_another_error(prompt_ids, **params):
    got = request(prompt_ids=prompt_ids, **with_params(**params))
    error = None
    try:
        validate(got, BOUNDS)
    except RequestError as raised:
        error = raised
    if error is not None:
        assert error.code is ErrorCode.INVALID_ARGUMENT
        assert error.field
    else:
        assert math.isfinite(params["temperature"])
        assert 1 <= params["max_tokens"] <= CONTEXT
