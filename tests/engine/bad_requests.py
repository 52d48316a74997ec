"""Requests that every engine refuses, and the field that each is refused for."""

import math

from pallasite.engine import Request, SamplingParams
from pallasite.engine.validation import Bounds

HUGE = 10**5000
"""An integer that Python itself will not print, nor turn into a float."""


def unchecked(value, fields):
    """Sets fields as production does, where nothing compares them with their annotations."""
    for name, field in fields.items():
        assert hasattr(value, name)
        object.__setattr__(value, name, field)
    return value


def with_params(**params):
    return {"params": unchecked(SamplingParams(max_tokens=4), params)}


def request(**fields):
    """A good request of three prompt and four completion tokens, but for these fields."""
    return unchecked(Request(prompt_ids=(0, 1, 2)), {**with_params(), **fields})


def refused(bounds: Bounds):
    """Returns the pairs (field, what to change of `request`) that bounds with the default limits
    refuse."""
    vocab_size, context_len = bounds.vocab_size, bounds.max_context_len
    most_tokens = min(context_len, bounds.num_cached_tokens) - 3
    return [
        ("prompt", {"prompt_ids": ()}),
        ("prompt", {"prompt_ids": (0,) * context_len}),
        ("prompt", {"prompt_ids": (0,) * 100_000}),
        ("prompt", {"prompt_ids": (0, vocab_size)}),
        ("prompt", {"prompt_ids": (-1, 0)}),
        ("prompt", {"prompt_ids": (HUGE,)}),
        ("prompt", {"prompt_ids": (0, True)}),
        ("prompt", {"prompt_ids": (0, 1.0)}),
        ("prompt", {"prompt_ids": ("a",)}),
        ("request_id", {"request_id": b"r"}),
        ("request_id", {"request_id": "r" * 129}),
        ("request_id", {"request_id": "a\nb"}),
        ("tenant", {"tenant": "t" * 129}),
        ("tenant", {"tenant": "\x00"}),
        ("tenant", {"tenant": "\ud800"}),
        ("priority", {"priority": 2**31}),
        ("priority", {"priority": -(2**31) - 1}),
        ("timeout_s", {"timeout_s": 0.0}),
        ("timeout_s", {"timeout_s": -1.0}),
        ("timeout_s", {"timeout_s": math.nan}),
        ("timeout_s", {"timeout_s": math.inf}),
        ("timeout_s", {"timeout_s": HUGE}),
        ("timeout_s", {"timeout_s": "1"}),
        ("sampling.max_tokens", with_params(max_tokens=0)),
        ("sampling.max_tokens", with_params(max_tokens=-1)),
        ("sampling.max_tokens", with_params(max_tokens=most_tokens + 1)),
        ("sampling.max_tokens", with_params(max_tokens=context_len)),
        ("sampling.max_tokens", with_params(max_tokens=2**31 - 1)),
        ("sampling.max_tokens", with_params(max_tokens=2**31)),
        ("sampling.max_tokens", with_params(max_tokens=HUGE)),
        ("sampling.min_tokens", with_params(min_tokens=-1)),
        ("sampling.min_tokens", with_params(min_tokens=5)),
        ("sampling.n", with_params(n=0)),
        ("sampling.n", with_params(n=17)),
        ("sampling.n", with_params(n=HUGE)),
        ("sampling.temperature", with_params(temperature=-0.1)),
        ("sampling.temperature", with_params(temperature=100.1)),
        ("sampling.temperature", with_params(temperature=math.nan)),
        ("sampling.temperature", with_params(temperature=math.inf)),
        ("sampling.temperature", with_params(temperature=HUGE)),
        ("sampling.temperature", with_params(temperature=True)),
        ("sampling.temperature", with_params(temperature=None)),
        ("sampling.top_k", with_params(top_k=-1)),
        ("sampling.top_k", with_params(top_k=vocab_size + 1)),
        ("sampling.top_p", with_params(top_p=0.0)),
        ("sampling.top_p", with_params(top_p=1.0001)),
        ("sampling.top_p", with_params(top_p=math.nan)),
        ("sampling.min_p", with_params(min_p=-0.1)),
        ("sampling.min_p", with_params(min_p=1.1)),
        ("sampling.min_p", with_params(min_p=math.nan)),
        ("sampling.repetition_penalty", with_params(repetition_penalty=0.0)),
        ("sampling.repetition_penalty", with_params(repetition_penalty=0.0099)),
        ("sampling.repetition_penalty", with_params(repetition_penalty=1e-40)),
        ("sampling.repetition_penalty", with_params(repetition_penalty=100.1)),
        ("sampling.repetition_penalty", with_params(repetition_penalty=math.inf)),
        ("sampling.presence_penalty", with_params(presence_penalty=100.1)),
        ("sampling.presence_penalty", with_params(presence_penalty=-math.inf)),
        ("sampling.frequency_penalty", with_params(frequency_penalty=-100.1)),
        ("sampling.frequency_penalty", with_params(frequency_penalty=math.nan)),
        ("sampling.seed", with_params(seed=2**64)),
        ("sampling.seed", with_params(seed=-(2**63) - 1)),
        ("sampling.logprobs", with_params(logprobs=-1)),
        ("sampling.logprobs", with_params(logprobs=21)),
        ("sampling.prompt_logprobs", with_params(prompt_logprobs=-1)),
        ("sampling.prompt_logprobs", with_params(prompt_logprobs=21)),
        ("sampling.logit_bias", with_params(logit_bias={vocab_size: 0.0})),
        ("sampling.logit_bias", with_params(logit_bias={-1: 0.0})),
        ("sampling.logit_bias", with_params(logit_bias={0: math.nan})),
        ("sampling.logit_bias", with_params(logit_bias={0: math.inf})),
        ("sampling.logit_bias", with_params(logit_bias={0: 1000.1})),
        ("sampling.logit_bias", with_params(logit_bias=dict.fromkeys(range(1025), 0.0))),
        ("sampling.allowed_token_ids", with_params(allowed_token_ids=())),
        ("sampling.allowed_token_ids", with_params(allowed_token_ids=(vocab_size,))),
        ("sampling.allowed_token_ids", with_params(allowed_token_ids=(0,) * (vocab_size + 1))),
        ("sampling.stop_token_ids", with_params(stop_token_ids=(0,) * 17)),
        ("sampling.stop_token_ids", with_params(stop_token_ids=(vocab_size,))),
        ("sampling.bad_words", with_params(bad_words=((0,),) * 65)),
        ("sampling.bad_words", with_params(bad_words=((),))),
        ("sampling.bad_words", with_params(bad_words=((0,) * 17,))),
        ("sampling.bad_words", with_params(bad_words=((0, vocab_size),))),
        ("sampling.bad_words", with_params(allowed_token_ids=(1, 2), bad_words=((1,), (2,)))),
    ]
