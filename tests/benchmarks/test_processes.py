"""What a process holds and uses, against what it was made to hold and use."""

import os
import subprocess
import sys
import time

from benchmarks.processes import OthersClock, cpu_seconds_of, memory_of

MIB = 1 << 20


# A process that shares few pages, so that its share of them hardly moves as others come and go.
HOLDER = """
import sys
print(flush=True)
sys.stdin.readline()
held = b"1" * int(sys.argv[1])
print(flush=True)
sys.stdin.readline()
"""


def test_memory_that_is_touched_is_counted():
    command = [sys.executable, "-I", "-S", "-c", HOLDER, str(256 * MIB)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()
        before = memory_of(holder.pid)
        holder.stdin.write("\n")
        holder.stdin.flush()
        holder.stdout.readline()
        after = memory_of(holder.pid)
        holder.kill()
    for name in ("resident", "anonymous", "proportional"):
        grown = getattr(after, name) - getattr(before, name)
        assert 240 * MIB < grown < 272 * MIB, name
    assert after.peak_resident >= after.resident - MIB
    assert after.peak_resident >= after.anonymous > 240 * MIB > before.peak_resident


def test_cpu_time_counts_work_and_not_waiting():
    pid = os.getpid()
    start_s, before_s = cpu_seconds_of(pid), time.process_time()
    while time.process_time() - before_s < 0.3:
        sum(range(1000))
    worked_s = cpu_seconds_of(pid) - start_s
    expected_s = time.process_time() - before_s
    # The kernel counts in ticks, of 10 ms as a rule.
    assert abs(worked_s - expected_s) < 0.05


BUSY = "import time; print(flush=True)\nwhile True: pass"


def test_what_others_take_is_told_from_our_own():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        assert busy.stdout is not None
        busy.stdout.readline()
        before_s = time.perf_counter()
        others, known = OthersClock(), OthersClock(busy.pid)
        busy_s, start_s = cpu_seconds_of(busy.pid), time.perf_counter()
        while cpu_seconds_of(busy.pid) - busy_s < 0.5:
            time.sleep(0.01)
        end_s = time.perf_counter()
        took = others.cores() - known.cores()
        cores = (cpu_seconds_of(busy.pid) - busy_s) / (time.perf_counter() - start_s)
        after_s = time.perf_counter()
        busy.kill()
    # What all cores did between readings that belong together is counted by some of them only.
    held_up_s = start_s - before_s + after_s - end_s
    assert abs(took - cores) < 0.1 + os.cpu_count() * held_up_s / (end_s - start_s)
