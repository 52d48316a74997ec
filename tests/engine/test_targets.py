"""Engines on caches laid out as a target's are, on a CPU that says it is one.

Attention runs by its definition in place of the target's kernels; all else is the target's own:
pages, rows, forms and what the compiler is asked for.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallasite.engine import ConfigError, Engine, EngineConfig, runtime
from pallasite.engine import deployment as deployments
from pallasite.engine.deployment import plan_deployment
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels import paged_attention
from pallasite.pallas_kernels.paged_attention import reference
from pallasite.pallas_kernels.target import CPU, GPU, H100, V6E, V7X
from tests.engine.answers import ROUNDING, assert_same_answers, logprob_errors
from tests.engine.harness import MAIN, ORACLE, assert_quiet, greedy, random_prompt, tokens
from tests.engine.speculating import eager, foreseen
from tests.tiny_checkpoints import TINY

PAGE_BYTES = TINY.num_layers * TINY.num_kv_heads * 128 * 128 * 4
"""Of a page of 128 on a TPU, whose rows are 128 wide, in f32."""


@pytest.fixture
def be(monkeypatch):
    """`be(target)`: from now on, the devices are of this kind."""

    def say(target):
        monkeypatch.setattr(deployments, "target_of", lambda platform, kind: target)
        monkeypatch.setitem(paged_attention._BODIES, target.platform, reference.paged_attention)

    return say


def scored(prompt, **params):
    return greedy(prompt, ignore_eos=True, logprobs=0, prompt_logprobs=0, **params)


def in_int8(rows):
    scales = np.abs(rows).max(axis=-1, keepdims=True) / 127
    return np.round(rows / scales) * scales


def in_fp8(rows):
    scales = np.abs(rows).max(axis=-1, keepdims=True) / 448
    return (rows / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scales


@pytest.mark.parametrize(("cache", "rounded"), [("auto", None), ("int8", in_int8), ("fp8", in_fp8)])
def test_an_engine_serves_a_tpus_cache(cache, rounded, engines, be, rng):
    requests = [scored(random_prompt(rng, int(n)), max_tokens=30) for n in rng.integers(1, 150, 12)]
    right = tokens(engines.get(MAIN).generate(requests))
    be(V7X)
    # Two pages of 128 a request, and two to spare.
    config = replace(MAIN, max_requests=4, cache=cache, num_pages=10, compile_cache=None)
    with Engine.load(engines.checkpoint, config) as engine:
        assert engine._runtime.page_size == 128
        held = engine._runtime._cache
        assert held.values.shape == (TINY.num_layers, 10, TINY.num_kv_heads, 1, 128, 128)
        dtype = {"auto": jnp.float32, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[cache]
        assert held.values.dtype == dtype
        got = engine.generate(requests)
        assert engine.metrics.misses == 0
        assert_quiet(engine)
    if rounded is None:
        assert_same_answers(requests, right, tokens(got))
        assert logprob_errors(requests, got).max() < ROUNDING
        return
    errors = logprob_errors(requests, got, replace(ORACLE, cached=rounded))
    # A value that lies between two that the cache can hold, to f32's last bits, may be either.
    assert errors.mean() < ROUNDING
    assert errors.max() < 50 * ROUNDING
    # What rounding itself does is far more.
    assert logprob_errors(requests, got).mean() > 20 * ROUNDING


@pytest.mark.parametrize("target", [CPU, GPU, V6E], ids=lambda target: target.name)
def test_an_fp8_cache_is_refused_where_fp8_is_not_multiplied(target, be):
    be(target)
    with pytest.raises(ConfigError) as caught:
        plan_deployment(TINY, EngineConfig(cache="fp8"))
    assert str(caught.value) == (
        f"got cache='fp8' for {target.name}, which does not multiply fp8; allowed are auto and"
        " int8; choose one"
    )


@pytest.mark.parametrize("target", [V7X, H100], ids=lambda target: target.name)
def test_an_fp8_cache_is_planned_where_it_is_multiplied(target, be):
    be(target)
    planned = plan_deployment(TINY, EngineConfig(cache="fp8", num_pages=10))
    assert planned.cache_spec.form == "fp8"
    assert planned.model.target is target
    assert planned.memory_plan(0, None).cache == planned.cache_spec.num_bytes > 0


PAGES_OF_2_GIB = 2**31 // (TINY.num_layers * TINY.num_kv_heads * 2 * 32 * TINY.head_width)
"""Of a cache of 8 bits on a GPU; its kernels take none above that, up to twice as many."""


def in_8_bits(num_pages, **values):
    return EngineConfig(cache="int8", num_pages=num_pages, max_requests=4, **values)


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2, model=2)], ids=str)
def test_a_cache_that_a_gpus_kernels_do_not_take_is_refused_before_anything_is_compiled(mesh, be):
    be(H100)
    most = PAGES_OF_2_GIB * mesh.num_devices
    for num_pages in (most, 2 * most + mesh.data):
        plan_deployment(TINY, in_8_bits(num_pages, mesh=mesh))
    for num_pages in (most + mesh.data, 2 * most):
        with pytest.raises(ConfigError) as caught:
            plan_deployment(TINY, in_8_bits(num_pages, mesh=mesh))
        assert str(caught.value) == (
            f"got a cache of {num_pages} pages, {32 * num_pages} tokens; on gpu:h100 this model's"
            f" cache in int8 must be of at most {most} pages, {32 * most} tokens, or of at least"
            f" {2 * most + mesh.data} pages, {32 * (2 * most + mesh.data)} tokens; lower or raise"
            " --cache-tokens or --num-pages"
        )
    by_tokens = in_8_bits(None, cache_tokens=32 * 2 * most, mesh=mesh)
    with pytest.raises(ConfigError, match=f"got a cache of {2 * most} pages"):
        plan_deployment(TINY, by_tokens)
    # Of 16 bits they take any.
    plan_deployment(TINY, replace(by_tokens, cache="auto"))


def test_a_cache_that_takes_what_is_left_is_one_that_a_gpus_kernels_take(be, monkeypatch):
    be(H100)
    deployment = plan_deployment(TINY, in_8_bits(None))
    monkeypatch.setattr(runtime.Programs, "compile", lambda self, progress: None)
    monkeypatch.setattr(runtime.Programs, "temporary_bytes", lambda self: 10**6)
    lines = []
    filled = runtime._fill_with_cache(deployment, 3 * 2**30, lines.append)
    assert filled.cache_spec.num_pages == PAGES_OF_2_GIB
    assert f"kernels take at most {PAGES_OF_2_GIB}, or at least" in lines[-1]
    larger = runtime._fill_with_cache(deployment, 6 * 2**30, lines.append)
    assert larger.cache_spec.num_pages > 2 * PAGES_OF_2_GIB


def test_a_cache_that_takes_what_is_left_leaves_an_allocator_some_room(engines, be, monkeypatch):
    be(V7X)
    limit = 10**9
    monkeypatch.setattr(runtime, "memory_limit", lambda device: limit)
    # Of a real cache of so many pages nobody needs the bytes.
    real = deployments.Deployment.with_pages
    asked = []

    def few_pages(deployment, num_pages):
        asked.append(deployment.memory_plan(0, limit).total + num_pages * PAGE_BYTES)
        return real(deployment, min(num_pages, 18))

    monkeypatch.setattr(deployments.Deployment, "with_pages", few_pages)
    monkeypatch.setattr(runtime.Programs, "compile", lambda self, progress: None)
    monkeypatch.setattr(runtime.Programs, "temporary_bytes", lambda self: 10**6)
    config = replace(MAIN, num_pages=None, compile_cache=None)
    with Engine.load(engines.checkpoint, config) as engine:
        assert engine._runtime.cache_spec.page_bytes == PAGE_BYTES
    assert 0.9 * limit < asked[-1] <= 0.97 * limit


def test_a_device_without_room_says_so_at_the_start(engines, monkeypatch):
    def allocate(cache_spec, mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(CacheSpec, "allocate", allocate)
    message = (
        r"got a model that needs .*cache 0\.00 GB.*; the device had no room for all of it; lower"
    )
    with pytest.raises(ConfigError, match=message):
        Engine.load(engines.checkpoint, replace(MAIN, compile_cache=engines.compile_cache))


def test_a_kernel_that_does_not_fit_is_not_told_as_want_of_memory(engines, monkeypatch):
    def compile(programs, progress):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded")

    monkeypatch.setattr(runtime.Programs, "compile", compile)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory"):
        Engine.load(engines.checkpoint, replace(MAIN, compile_cache=None))


@pytest.mark.parametrize("target", [V6E, H100], ids=lambda target: target.name)
def test_kernels_answer_as_the_definition_does(target, engines, be, monkeypatch, request, rng):
    """The target's own kernels in an interpreter, under the engine's buckets, pages and padding."""
    kernels = paged_attention._BODIES[target.platform]
    requests = [scored(random_prompt(rng, n), max_tokens=8) for n in (1, 31, 130, 7)]
    answers = engines.get(MAIN).generate(requests)
    be(target)

    def interpreted(q, kv_new, cache, layer, ragged, config, sinks):
        config = replace(config, interpret=True)
        return kernels(q, kv_new, cache, layer, ragged, config, sinks)

    monkeypatch.setitem(paged_attention._BODIES, target.platform, interpreted)
    # An interpreted kernel is a large program; what the compiler makes of it is not in question.
    unhurried = jax.config.values["jax_disable_most_optimizations"]
    request.addfinalizer(lambda: jax.config.update("jax_disable_most_optimizations", unhurried))
    jax.config.update("jax_disable_most_optimizations", True)
    config = replace(MAIN, max_requests=2, max_batch_tokens=8, num_pages=20, compile_cache=None)
    config = replace(config, speculate="ngram", speculate_tokens=3)
    with Engine.load(engines.checkpoint, config) as engine:
        with foreseen(eager(engine), requests, answers, monkeypatch):
            got = engine.generate(requests)
        assert engine.metrics.misses == 0
        assert engine.metrics.accepted_tokens >= 3
        assert engine.metrics.num_steps > 20
        assert_quiet(engine)
    assert_same_answers(requests, tokens(answers), tokens(got))
    assert logprob_errors(requests, got).max() < ROUNDING
