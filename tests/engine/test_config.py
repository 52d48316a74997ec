"""What an operator may ask of an engine, and what does not fit: said at start, with the numbers."""

from dataclasses import replace

import jax
import pytest

from pallasite.engine import ConfigError, EngineConfig
from pallasite.engine import runtime as runtime_module
from pallasite.engine.deployment import plan_deployment
from pallasite.engine.planner import (
    MemoryPlan,
    choose_num_pages,
    default_cpu_pages,
    memory_limit,
    pages_that_fit,
)
from pallasite.models.kv_cache import CacheSpec
from pallasite.models.partition import Partition
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels.target import TARGETS
from tests.engine.harness import MAIN
from tests.tiny_checkpoints import TINY

PLAN = MemoryPlan(
    weights=1000,
    adapters=0,
    loading=0,
    cache=0,
    page=8192,
    sampler=200,
    temporaries=300,
    limit=10_000,
)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_requests", {"max_requests": 1}),
        ("max_batch_tokens", {"max_batch_tokens": 32}),
        ("max_waiting", {"max_waiting": 0}),
        ("max_unread_tokens", {"max_unread_tokens": 0}),
        ("max_leases", {"max_leases": -1}),
        ("max_context_len", {"max_context_len": 1}),
        ("num_pages", {"num_pages": 0}),
        ("cache_tokens", {"cache_tokens": 1}),
        ("num_pages", {"num_pages": 9, "cache_tokens": 99}),
        ("weights", {"weights": "f16"}),
        ("cache", {"cache": "fp4"}),
        ("speculate", {"speculate": "draft-model"}),
        ("speculate_tokens", {"speculate_tokens": 4}),
        ("speculate_tokens", {"speculate": "ngram", "speculate_tokens": 0}),
        ("speculate_tokens", {"speculate": "ngram", "speculate_tokens": 33}),
        ("max_lease_s", {"max_lease_s": 0.0}),
        ("max_lease_s", {"max_lease_s": float("nan")}),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(field, values):
    config = EngineConfig()
    for name, value in values.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ConfigError, match=field) as caught:
        config.__post_init__()
    assert str(caught.value).startswith("got ")


def test_the_defaults_and_the_least_of_everything_are_taken():
    EngineConfig()
    EngineConfig(
        max_requests=2, max_batch_tokens=3, max_waiting=1, max_unread_tokens=1, max_leases=0
    )


def test_tokens_are_drafted_where_a_method_is_named():
    assert EngineConfig().num_drafts == 0
    assert EngineConfig(speculate="ngram").num_drafts == 7
    assert [EngineConfig(speculate="ngram", speculate_tokens=k).num_drafts for k in (1, 32)] == [
        1,
        32,
    ]


def test_pages_are_those_asked_for_or_a_cpus_default():
    assert choose_num_pages(EngineConfig(), 16) is None
    assert choose_num_pages(EngineConfig(num_pages=7), 16) == 7
    assert choose_num_pages(EngineConfig(cache_tokens=33), 16) == 3
    assert default_cpu_pages(EngineConfig(max_requests=4), 16, 512) == 4 * 1024 // 16
    assert default_cpu_pages(EngineConfig(max_requests=2), 16, 8200) == 513


def test_pages_fill_what_the_rest_leaves_and_not_a_byte_more():
    spec = CacheSpec(
        partition=Partition(config=TINY), target=TARGETS["cpu"], form="f32", num_pages=0
    )
    assert spec.page_bytes == PLAN.page == 2 * 2 * 2 * 16 * 16 * 4
    rest = PLAN.weights + PLAN.sampler + PLAN.temporaries
    assert PLAN.total == rest == 1500
    for pages in (1, 10):
        limit = rest + pages * spec.page_bytes
        assert pages_that_fit(replace(PLAN, limit=limit)) == pages
        assert pages_that_fit(replace(PLAN, limit=limit + spec.page_bytes - 1)) == pages
    with pytest.raises(ConfigError, match="got no cache size"):
        pages_that_fit(replace(PLAN, limit=None))
    with pytest.raises(ConfigError, match=r"needs 0.00 GB"):
        pages_that_fit(replace(PLAN, limit=1499))
    with pytest.raises(ConfigError):
        pages_that_fit(replace(PLAN, limit=rest + spec.page_bytes - 1))


def test_a_plan_that_does_not_fit_says_so_with_the_numbers():
    replace(PLAN, limit=1500).check()
    replace(PLAN, limit=None).check()
    large = MemoryPlan(
        weights=5 * 10**9,
        adapters=0,
        loading=0,
        cache=2 * 10**9,
        page=10**6,
        sampler=10**8,
        temporaries=3 * 10**8,
        limit=4 * 10**9,
    )
    with pytest.raises(ConfigError) as caught:
        large.check()
    message = str(caught.value)
    for number in ("7.40 GB", "5.00 GB", "2.00 GB", "0.10 GB", "0.30 GB", "4.00 GB"):
        assert number in message
    assert "lower" in message


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=2, model=2)], ids=str)
def test_a_plan_counts_one_adapter_more_while_it_is_put_beside_the_others(mesh):
    def plan(num_slots):
        rank = 4 if num_slots else None
        config = replace(MAIN, mesh=mesh, max_adapters=num_slots, max_adapter_rank=rank)
        return plan_deployment(TINY, config).memory_plan(0, None)

    none, one, three = plan(0), plan(1), plan(3)
    assert none.adapters == none.loading == 0
    assert one.adapters == one.loading == three.loading > 0
    assert three.adapters == 3 * one.adapters
    assert three.total == none.total + 4 * one.adapters


def test_this_machine_has_a_limit_and_a_device_says_its_own():
    limit = memory_limit(jax.devices()[0])
    assert 10**8 < limit < 10**13


def test_a_model_that_does_not_fit_is_refused_before_it_serves(engines, monkeypatch):
    monkeypatch.setattr(runtime_module, "memory_limit", lambda device: 10**6)
    with pytest.raises(ConfigError, match=r"the device has 0.00 GB"), engines.fresh(MAIN):
        pass


def test_a_context_longer_than_the_models_is_refused(engines):
    config = replace(MAIN, max_context_len=TINY.context_len + 1)
    with pytest.raises(ConfigError, match="made for 512 tokens"), engines.fresh(config):
        pass
