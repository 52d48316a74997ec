"""Lines through steps' times, what stands beside them, and the page that is made of both."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import step_cost, step_cost_page
from benchmarks.kernel_page import END, MARK, fill_in
from benchmarks.step_cost import SERIES, Series, figures, machine_speeds, measure
from benchmarks.step_cost_fit import Speeds, Work, fit, roofline
from pallasite.models.errors import ConfigError
from tests.engine.harness import MAIN
from tests.engine.toy_runtime import ToyRuntime

WORK = Work(weight_bytes=1000, row_operations=200, head_operations=50, cached_bytes=40)
SPEEDS = Speeds(read=100.0, operations=500.0)
SMALL = (
    Series(name="rows", kind="rows", sizes=(1, 2, 4)),
    Series(name="prompt", kind="prompt", sizes=(4, 8, 16)),
    Series(name="cached", kind="cached", sizes=(20, 40, 60), num_requests=2, num_rounds=1),
)


def test_a_line_is_found_again():
    x = [1.0, 2.0, 4.0, 32.0]
    line = fit(x, [3.0 + 0.5 * each for each in x])
    assert line.start == pytest.approx(3.0)
    assert line.slope == pytest.approx(0.5)
    assert line.r_squared == pytest.approx(1.0)
    assert line.largest_miss == pytest.approx(0.0, abs=1e-12)


def test_a_miss_is_a_share_of_its_point():
    """By hand: through (0, 1), (1, 1), (1, 2) go 1 at 0 and, of 1 and 2, the a of least
    (1 - a)^2 + ((2 - a) / 2)^2, which is 6 / 5."""
    line = fit([0.0, 1.0, 1.0], [1.0, 1.0, 2.0])
    assert line.start == pytest.approx(1.0)
    assert line.slope == pytest.approx(0.2)
    assert line.largest_miss == pytest.approx(0.4)
    assert line.r_squared == pytest.approx(1 - (0.2**2 + 0.8**2) / (2 / 3))


def test_what_is_no_line_is_seen():
    x = np.arange(1.0, 9.0)
    assert fit(x.tolist(), (x**2).tolist()).largest_miss > 0.3


def test_the_machines_lines_by_hand():
    assert roofline(WORK, SPEEDS, "rows") == pytest.approx((10.0, 0.5))
    assert roofline(WORK, SPEEDS, "prompt") == pytest.approx((10.0, 0.4))
    assert roofline(WORK, SPEEDS, "cached") == pytest.approx((10.0, 0.4))


def test_the_best_speed_is_each_ones_higher():
    other = Speeds(read=200.0, operations=400.0)
    assert SPEEDS.best(other) == other.best(SPEEDS) == Speeds(read=200.0, operations=500.0)


def test_the_machine_has_speeds():
    speeds = machine_speeds(size=64, rounds=1, num_bytes=1 << 20)
    assert np.isfinite([speeds.read, speeds.operations]).all()
    assert min(speeds.read, speeds.operations) > 0


@pytest.mark.parametrize("series", SMALL)
def test_points_are_of_steps_of_their_size(series):
    runtime = ToyRuntime(MAIN, 1)
    points = measure(series, runtime, MAIN, 2)
    sizes = [point["size"] for point in points]
    assert len(sizes) == len(series.sizes)
    if series.kind == "cached":
        # Of all requests: their prompts, and some of what they decoded since.
        for size, prompt_len in zip(sizes, series.sizes, strict=True):
            assert 2 * prompt_len < size < 2 * prompt_len + 100
    else:
        assert tuple(sizes) == series.sizes
    num_rounds = series.num_rounds or 2
    in_a_round = step_cost.NUM_PROMPTS if series.kind == "prompt" else step_cost.NUM_STEPS
    for point in points:
        assert len(point["seconds"]["runs"]) == num_rounds * in_a_round
        assert point["program"].startswith("mixed" if series.kind == "prompt" else "decode")


def test_what_has_no_room_is_refused():
    series = replace(SMALL[0], sizes=(1, MAIN.max_requests + 1))
    with pytest.raises(ConfigError, match=r"room for \[1\] of the series rows"):
        measure(series, ToyRuntime(MAIN, 1), MAIN, 1)


def result_of(all_series):
    points = [
        {"size": size, "program": "decode", "seconds": {"median": 10 + size, "runs": [1.0]}}
        for size in (1.0, 2.0, 4.0)
    ]
    made = {"command": "python -m benchmarks.step_cost --output /tmp/x.json", "date": "today"}
    machine = {"cores": 2, "architecture": "x86_64", "vectors": "AVX2", "memory_bytes": 8e9}
    series = {one.name: made | figures(one, points, WORK, SPEEDS) for one in all_series}
    return {"model_id": "tiny", "machine": machine, "series": series}


def test_the_page_has_each_line_and_each_point(tmp_path):
    result = json.loads(json.dumps(result_of(SERIES)))
    page = tmp_path / "page.md"
    page.write_text("".join(f"{MARK.format(name)}\n{END}\n" for name in step_cost_page.NAMES))
    fill_in(page, step_cost_page.tables(result))
    text = page.read_text()
    assert text.count("| decode of 8 requests, by cached tokens |") == 1 + 3
    # Starts at 10 s as the machine would, and rises by 1 s where that would by 0.5.
    line = "| decode at a short context, by rows | 10,000 | 10,000 | 1,000,000 | 500,000 | 2.00 |"
    assert line in text
    assert "`python -m benchmarks.step_cost --output x.json`, today" in text
    assert "/tmp" not in text


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    step_cost_page.draw(tmp_path / "cost.png", result_of(SERIES))
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
