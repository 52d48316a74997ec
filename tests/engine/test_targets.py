"""Engines on caches laid out as a target's are, on a CPU that says it is one.

Attention runs by its definition in place of the target's kernels; all else is the target's own:
pages, rows, forms and what the compiler is asked for.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallasite.engine import ConfigError, Engine, EngineConfig
from pallasite.engine import deployment as deployments
from pallasite.engine.deployment import plan_deployment
from pallasite.pallas_kernels import paged_attention
from pallasite.pallas_kernels.paged_attention import reference
from pallasite.pallas_kernels.target import CPU, GPU, H100, V6E, V7X
from tests.engine.answers import assert_same_answers
from tests.engine.harness import MAIN, assert_quiet, greedy, random_prompt, tokens
from tests.tiny_checkpoints import TINY


@pytest.fixture
def be(monkeypatch):
    """`be(target)`: from now on, the devices are of this kind."""

    def say(target):
        monkeypatch.setattr(deployments, "target_of", lambda platform, kind: target)
        monkeypatch.setitem(paged_attention._BODIES, target.platform, reference.paged_attention)

    return say


@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
def test_an_engine_serves_a_tpus_cache(cache, engines, be, rng):
    requests = [
        greedy(random_prompt(rng, int(n)), max_tokens=30, ignore_eos=True)
        for n in rng.integers(1, 150, 12)
    ]
    right = tokens(engines.get(MAIN).generate(requests))
    be(V7X)
    # Two pages of 128 a request, and two to spare.
    config = replace(MAIN, cache=cache, num_pages=18, compile_cache=None)
    with Engine.load(engines.checkpoint, config) as engine:
        assert engine._runtime.page_size == 128
        held = engine._runtime._cache
        assert held.values.shape == (TINY.num_layers, 18, TINY.num_kv_heads, 1, 128, 128)
        dtype = {"auto": jnp.float32, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[cache]
        assert held.values.dtype == dtype
        got = tokens(engine.generate(requests))
        assert engine.metrics.misses == 0
        assert_quiet(engine)
    if cache == "auto":
        assert_same_answers(requests, right, got)
    else:
        # Rounding may turn a close choice, after which the rest is another text; by chance one
        # of 320 tokens would be the same.
        same = sum(a[0] == b[0] for a, b in zip(got, right, strict=True))
        assert same >= 6, f"{same} of 12 answers begin as they do with an f32 cache"


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


@pytest.mark.parametrize("target", [V6E, H100], ids=lambda target: target.name)
def test_kernels_answer_as_the_definition_does(target, engines, be, monkeypatch, request, rng):
    """The target's own kernels in an interpreter, under the engine's buckets, pages and padding."""
    kernels = paged_attention._BODIES[target.platform]
    requests = [
        greedy(random_prompt(rng, n), max_tokens=4, ignore_eos=True) for n in (1, 31, 130, 7)
    ]
    right = tokens(engines.get(MAIN).generate(requests))
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
    with Engine.load(engines.checkpoint, config) as engine:
        got = tokens(engine.generate(requests))
        assert engine.metrics.misses == 0
        assert_quiet(engine)
    assert_same_answers(requests, right, got)
