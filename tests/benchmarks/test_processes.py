"""What a process holds and uses, against what it was made to hold and use."""

import os
import time

import numpy as np

from benchmarks.processes import cpu_seconds_of, memory_of

MIB = 1 << 20


def test_memory_that_is_touched_is_counted():
    before = memory_of(os.getpid())
    held = np.ones(64 * MIB, np.uint8)
    after = memory_of(os.getpid())
    for name in ("resident", "anonymous", "proportional"):
        grown = getattr(after, name) - getattr(before, name)
        assert 60 * MIB < grown < 80 * MIB, name
    assert after.peak_resident >= after.resident - MIB
    del held


def test_cpu_time_counts_work_and_not_waiting():
    pid = os.getpid()
    start_s, before_s = cpu_seconds_of(pid), time.process_time()
    while time.process_time() - before_s < 0.3:
        sum(range(1000))
    worked_s = cpu_seconds_of(pid) - start_s
    # The kernel counts in ticks, of 10 ms as a rule.
    assert 0.25 < worked_s < 0.6
