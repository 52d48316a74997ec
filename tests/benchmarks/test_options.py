"""The load that is sent."""

import math

import numpy as np
import pytest

from benchmarks.options import Workload
from pallasite.models.errors import ConfigError


def test_requests_are_as_long_as_asked_and_the_same_again():
    workload = Workload(num_prompts=5, input_len=7, output_len=9, seed=3)
    requests = workload.requests(100)
    assert [len(request.prompt_ids) for request in requests] == [7] * 5
    assert {token_id for request in requests for token_id in request.prompt_ids} <= set(range(100))
    assert all(request.params.max_tokens == 9 for request in requests)
    assert all(request.params.ignore_eos for request in requests)
    again = workload.requests(100)
    assert [r.prompt_ids for r in requests] == [r.prompt_ids for r in again]
    other = Workload(num_prompts=5, input_len=7, seed=4).requests(100)
    assert [r.prompt_ids for r in requests] != [r.prompt_ids for r in other]


def test_all_arrive_at_once_unless_a_rate_is_given():
    np.testing.assert_array_equal(Workload(num_prompts=3).arrivals_s(), [0, 0, 0])


def test_arrivals_keep_their_rate():
    arrivals_s = Workload(num_prompts=4000, request_rate=50.0).arrivals_s()
    gaps_s = np.diff(arrivals_s)
    assert (gaps_s >= 0).all()
    # Exponential gaps: mean and deviation are both 1 / rate; 4,000 of them know both within 1.6%.
    assert np.mean(gaps_s) == pytest.approx(1 / 50, rel=0.08)
    assert np.std(gaps_s) == pytest.approx(1 / 50, rel=0.12)


@pytest.mark.parametrize(
    "fault",
    [
        {"num_prompts": 0},
        {"input_len": 0},
        {"output_len": -1},
        {"request_rate": 0.0},
        {"request_rate": math.nan},
        {"seed": -1},
    ],
)
def test_a_load_that_cannot_be_is_refused(fault):
    with pytest.raises(ConfigError, match=rf"got {next(iter(fault))}=.*; it must be .*; "):
        Workload(**fault)
