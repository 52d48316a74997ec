"""How long the steps that speculation chooses between take, measured before the first request."""

import time
from itertools import accumulate

import numpy as np

from pallasite.engine.layout import Bucket
from pallasite.engine.runtime import Runtime

CONTEXT_LEN = 256
"""Cached tokens of each row, where the context holds as many."""

LEAST_RUNS = 2
TIMED_S = 0.1
"""Each program runs so often, and so long in all; the quickest run counts."""


def step_seconds(runtime: Runtime) -> dict[Bucket, float]:
    """Returns the seconds of a step of each bucket that only decodes or verifies, all in use.

    To be called while no sequence holds pages: it writes to some.
    """
    buckets = [bucket for bucket in runtime.programs.buckets if not bucket.has_prefill]
    return never_falling({bucket: _seconds(runtime, bucket) for bucket in buckets})


def never_falling(seconds: dict[Bucket, float]) -> dict[Bucket, float]:
    """Returns times of which none is above that of a step of more tokens.

    A time above a larger step's was disturbed: others may compute on the machine.
    """
    largest_first = sorted(seconds, key=lambda b: (b.num_tokens, b.num_drafts), reverse=True)
    least = accumulate((seconds[bucket] for bucket in largest_first), min)
    return dict(zip(largest_first, least, strict=True))


def _seconds(runtime: Runtime, bucket: Bucket) -> float:
    words = np.zeros((runtime.num_shards, runtime.layouts[bucket].num_words), np.int32)
    for each in words:
        _fill(runtime.layouts[bucket].views(each), bucket, runtime)
    times: list[float] = []
    while len(times) < LEAST_RUNS or sum(times) < TIMED_S:
        start = time.perf_counter()
        np.asarray(runtime.run(bucket, words)[0])
        times.append(time.perf_counter() - start)
    return min(times)


def _fill(views: dict[str, np.ndarray], bucket: Bucket, runtime: Runtime) -> None:
    """Makes rows of as many tokens as a row has at most. Nothing is sampled of them."""
    num_requests = -(-bucket.num_tokens // (1 + bucket.num_drafts))
    ends = np.arange(1, num_requests + 1) * bucket.num_tokens // num_requests
    counts = np.diff(ends, prepend=0)
    num_pages = runtime.cache_spec.num_pages // runtime.num_shards
    kv_len = min(CONTEXT_LEN, runtime.max_context_len, num_pages * runtime.page_size)
    views["query_starts"][1:] = bucket.num_tokens
    views["query_starts"][1 : num_requests + 1] = ends
    views["kv_lens"][:num_requests] = kv_len
    views["positions"][:] = kv_len - np.repeat(ends, counts) + np.arange(bucket.num_tokens)
    table = views["page_table"]
    table[:] = np.arange(table.size).reshape(table.shape) % num_pages
    views["adapter_slot"].fill(-1)
    views["num_requests"][...] = num_requests
    views["num_steps"][...] = 1
    views["num_decode"][...] = np.sum(counts == 1)
