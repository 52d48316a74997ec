"""The program table: complete before the first request, in place on the cache, flat in depth."""

import json
import re
import time
from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallasite.engine import ErrorCode, FinishReason, Request
from pallasite.engine.layout import Bucket
from pallasite.engine.programs import bucket_ladder
from pallasite.pallas_kernels.cpu import best_instructions
from tests.engine.harness import (
    MAIN,
    TIGHT,
    greedy,
    random_params,
    random_prompt,
)
from tests.tiny_checkpoints import TINY, random_tensors, write_hf


def programs_of(engine):
    return engine._runtime.programs


def copies(text, shape):
    """The instructions of an HLO text that copy an array of this shape."""
    dims = ",".join(str(size) for size in shape)
    made = rf"= \(?\w+\[{dims}\]\S* (?:\w+\[{dims}\]\S* )?copy(?:-start)?\("
    return re.findall(made, text)


def instructions(text):
    return sum(1 for line in text.splitlines() if " = " in line)


def test_five_hundred_requests_of_any_kind_compile_nothing(engines, rng):
    with engines.fresh() as engine:
        requests = [
            Request(
                prompt_ids=random_prompt(rng, int(rng.integers(1, 200))),
                params=random_params(rng, max_tokens=12),
                priority=int(rng.integers(-2, 3)),
            )
            for _ in range(500)
        ]
        completions = engine.generate(requests)
        assert len(completions) == sum(request.params.n for request in requests)
        assert {c.finish.reason for c in completions} <= {FinishReason.STOP, FinishReason.LENGTH}
        assert engine.metrics.compilations == 0
        assert engine.metrics.misses == 0
        # That 0 means something: one more program is seen.
        jax.jit(lambda x: x * 3.25 + 1)(np.zeros(17, np.float32)).block_until_ready()
        assert engine.metrics.compilations == 1


def test_a_step_without_a_program_is_counted_and_ends_what_it_would_have_run(
    engine, rng, monkeypatch
):
    programs = programs_of(engine)
    before = programs.misses
    largest = max(programs.buckets)
    without = {bucket: step for bucket, step in programs._steps.items() if bucket != largest}
    with monkeypatch.context() as patch:
        patch.setattr(programs, "_steps", without)
        [completion] = engine.generate([greedy(random_prompt(rng, 30), max_tokens=4)])
    assert completion.finish.error.code is ErrorCode.UNAVAILABLE
    assert engine.metrics.misses == before + 1
    with pytest.raises(LookupError, match="mixed of 99 tokens"):
        programs.step(Bucket(num_tokens=99, num_rows=8))
    assert engine.metrics.misses == before + 2
    [completion] = engine.generate([greedy(random_prompt(rng, 30), max_tokens=1)])
    assert completion.finish.error is None
    programs.misses = before


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_every_program_updates_the_cache_in_place_and_copies_it_nowhere(engines, weights):
    with engines.fresh(replace(TIGHT, weights=weights)) as engine:
        spec = engine._runtime.cache_spec
        assert spec.num_bytes == np.prod(spec.shape) * {"f32": 4, "bf16": 2}[weights]
        programs = programs_of(engine)
        # Without a body in C++ no product has one row.
        assert len(programs.buckets) == (4 if best_instructions() else 3)
        for bucket in programs.buckets:
            assert programs.aliased_bytes(bucket) >= spec.num_bytes
            text = programs._steps[bucket].as_text()
            assert f"[{','.join(map(str, spec.shape))}]" in text
            assert copies(text, spec.shape) == []


def test_a_copy_would_be_seen():
    shape = (2, 18, 2, 2, 16, 16)
    cache = jax.ShapeDtypeStruct(shape, jnp.float32)
    kept = jax.jit(lambda cache: cache.at[0, 0].set(1.0)).lower(cache).compile()
    assert len(copies(kept.as_text(), shape)) >= 1
    donated = jax.jit(lambda cache: cache.at[0, 0].set(1.0), donate_argnums=0)
    assert copies(donated.lower(cache).compile().as_text(), shape) == []


def test_programs_do_not_grow_with_depth(engines, tmp_path, capsys):
    config = replace(MAIN, max_requests=2, max_batch_tokens=8, num_pages=16)
    sizes, seconds = {}, {}
    for num_layers in (2, 30):
        model = replace(TINY, num_layers=num_layers)
        folder = write_hf(tmp_path / str(num_layers), model, random_tensors(model))
        start = time.perf_counter()
        with engines.fresh(config, folder) as engine:
            seconds[num_layers] = round(time.perf_counter() - start, 1)
            programs = programs_of(engine)
            sizes[num_layers] = {
                str(bucket): instructions(programs._steps[bucket].as_text())
                for bucket in programs.buckets
            }
            assert engine.generate([greedy([1, 2], max_tokens=2)])[0].finish.error is None
    with capsys.disabled():
        figures = {"test": "depth", "hlo_instructions": sizes, "load_s": seconds}
        print(f"\n{json.dumps(figures)}")
    for bucket, size in sizes[2].items():
        assert size > 100
        assert sizes[30][bucket] <= 1.5 * size


def test_the_ladder_has_a_program_for_every_plan():
    for max_rows, max_tokens, least_rows in [(8, 64, 2), (32, 512, 2), (5, 6, 1), (2, 2048, 2)]:
        buckets = bucket_ladder(max_rows, max_tokens, least_rows)
        assert buckets == sorted(set(buckets))
        decode = [bucket.num_rows for bucket in buckets if not bucket.has_prefill]
        mixed = [bucket.num_tokens for bucket in buckets if bucket.has_prefill]
        assert max(decode) == max_rows
        assert min(decode) >= least_rows
        assert max(mixed) == max_tokens
        assert {bucket.num_rows for bucket in buckets if bucket.has_prefill} == {max_rows}
        for smaller, larger in pairwise(decode):
            assert larger <= 2 * smaller
        assert len(buckets) <= 12


def test_the_ladder_of_verify_steps_takes_every_row_with_a_draft_and_one_row_with_the_longest():
    sizes = [(8, 64, 2, 4), (32, 512, 2, 7), (5, 6, 1, 3), (2, 2048, 2, 15), (256, 512, 1, 1)]
    for max_rows, max_tokens, least_rows, num_drafts in sizes:
        plain = bucket_ladder(max_rows, max_tokens, least_rows)
        buckets = bucket_ladder(max_rows, max_tokens, least_rows, num_drafts)
        assert buckets == sorted(set(buckets))
        assert [bucket for bucket in buckets if not bucket.num_drafts] == plain
        verify = [bucket for bucket in buckets if bucket.num_drafts]
        assert {bucket.num_drafts for bucket in verify} == {num_drafts}
        assert not any(bucket.has_prefill for bucket in verify)
        assert all(bucket.num_rows < bucket.num_tokens <= max_tokens for bucket in verify)
        assert max(bucket.num_rows for bucket in verify) == max_rows
        assert max(bucket.num_tokens for bucket in verify) >= min(1 + num_drafts, max_tokens)
        for smaller, larger in pairwise(verify):
            assert larger.num_tokens <= 2 * smaller.num_tokens
        assert len(verify) <= 9
