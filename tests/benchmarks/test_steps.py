"""The steps that are timed are full ones, on every data shard, of every program."""

from dataclasses import replace

import pytest

from benchmarks.steps import time_buckets
from pallasite.models.sharding import MeshShape
from tests.engine.harness import MAIN
from tests.engine.toy_runtime import ToyRuntime


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_program_is_timed_with_all_rows_of_all_shards(num_shards):
    config = replace(MAIN, mesh=MeshShape(data=num_shards))
    runtime = ToyRuntime(config, num_shards)
    steps = time_buckets(runtime, config, prompt_len=30, num_steps=5)
    assert list(steps) == runtime.programs.buckets
    for bucket, times in steps.items():
        assert len(times) >= 5
        assert {step.num_tokens for step in times} == {num_shards * bucket.num_tokens}
