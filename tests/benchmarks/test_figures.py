"""What the benchmarks make of what they saw: the served share, start-up's marks, memory."""

import pytest

from benchmarks.memory import Sample, figures
from benchmarks.processes import Memory, Said
from benchmarks.report import RequestRecord, serving_result
from benchmarks.serving import comparison
from benchmarks.startup import marks
from pallasite.models.errors import ConfigError


def run_of(num_tokens: int, error: str = ""):
    """A run of one request and one second."""
    record = RequestRecord(
        start_s=0.0,
        end_s=1.0,
        num_prompt_tokens=1,
        events=((0.5, num_tokens),),
        error=error,
    )
    return serving_result([record], 1.0, {})


def test_the_share_is_of_medians():
    result = comparison([run_of(90), run_of(10), run_of(80)], [100.0, 400.0, 50.0])
    assert result["served_to_offline"] == pytest.approx(0.8)
    assert result["output_throughput"] == 80
    assert result["served_output_throughput"] == {"median": 80.0, "runs": [90.0, 10.0, 80.0]}
    assert result["offline_output_throughput"]["median"] == 100.0


def test_of_two_runs_the_slower_is_shown():
    assert comparison([run_of(90), run_of(10)], [100.0, 100.0])["output_throughput"] == 10


def test_a_failed_request_ends_the_comparison():
    with pytest.raises(ConfigError, match=r"got 1 failed requests, the first with 'UNAVAILABLE'"):
        comparison([run_of(1), run_of(1, "UNAVAILABLE")], [1.0, 1.0])


SAID = [
    Said(after_s=1.0, text="loaded 1 of 12 tensors, 0.5 s"),
    Said(after_s=2.0, text="compiled program 1 of 2 (decode of 2 tokens), 1.5 s"),
    Said(after_s=3.0, text="loaded 12 of 12 tensors, 2.5 s"),
    Said(after_s=4.0, text="compiled program 2 of 2 (decode of 4 tokens), 3.5 s"),
    Said(after_s=5.0, text="tiny is served on 127.0.0.1:9000"),
]


def test_marks_are_the_last_lines_that_match():
    assert marks(SAID) == {
        "first word": 1.0,
        "weights loaded": 3.0,
        "programs ready": 4.0,
        "listening": 5.0,
    }


def test_a_mark_that_is_missing_is_an_error():
    with pytest.raises(ConfigError, match="got no mark 'weights loaded'"):
        marks(SAID[:2])
    with pytest.raises(ConfigError, match="got no mark 'first word'"):
        marks([])


def memory_of_size(resident: int) -> Memory:
    return Memory(
        resident=resident, peak_resident=2 * resident, proportional=resident, anonymous=resident
    )


def test_the_most_memory_while_all_ran_is_taken():
    samples = [
        Sample(num_running=running, memory=memory_of_size(resident))
        for running, resident in ((1, 50), (2, 20), (2, 30), (0, 40))
    ]
    result = figures(memory_of_size(10), samples, 2)
    assert result["idle"]["resident"] == 10
    assert result["loaded"]["resident"] == 30
    assert result["loaded"]["peak_resident"] == 60
    assert result["num_samples"] == 2


def test_requests_that_never_ran_together_are_an_error():
    samples = [Sample(num_running=1, memory=memory_of_size(1))]
    with pytest.raises(ConfigError, match="got 1 requests at once; all 2 must run together"):
        figures(memory_of_size(1), samples, 2)
