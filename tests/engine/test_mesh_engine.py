"""Engines on meshes: the answers are those of one device, whatever else is in the batch."""

from dataclasses import replace

import numpy as np
import pytest

from pallasite.engine import ConfigError, Engine, EngineConfig, Request
from pallasite.models.sharding import MeshShape
from tests.engine.answers import assert_same_answers
from tests.engine.harness import MAIN, greedy, random_params, random_prompt, tokens

MESHES = [
    MeshShape(model=2),
    MeshShape(model=8),
    MeshShape(data=2),
    MeshShape(data=2, model=4),
    MeshShape(data=4, model=2),
]
CROWDED = replace(MAIN, num_pages=64, max_context_len=128)
"""On four data shards, pages for two whole contexts each, and two slots."""


def requests_of(rng, count=24):
    """Prompts that take several chunks, and answers long enough to be preempted."""
    lengths = rng.integers(1, 80, count)
    return [
        greedy(random_prompt(rng, int(n)), max_tokens=int(rng.integers(8, 40)), ignore_eos=True)
        for n in lengths
    ]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_greedy_answers_are_those_of_one_device(engines, mesh, rng):
    requests = requests_of(rng)
    expected = tokens(engines.get(MAIN).generate(requests))
    with engines.fresh(replace(CROWDED, mesh=mesh)) as engine:
        got = tokens(engine.generate(requests))
        assert_same_answers(requests, expected, got)
        assert engine.metrics.compilations == 0
        assert engine.metrics.misses == 0


def test_sampled_answers_do_not_depend_on_their_shard(engines, rng):
    """Seeds decide; where a request runs, and beside what, does not."""
    requests = [
        Request(
            prompt_ids=random_prompt(rng, int(rng.integers(2, 60))),
            params=replace(random_params(rng), seed=int(rng.integers(0, 2**31)), logprobs=None),
        )
        for _ in range(30)
    ]
    with engines.fresh(replace(CROWDED, mesh=MeshShape(data=2))) as engine:
        first = engine.generate(requests)
        again = engine.generate(requests[::-1])
    by_request = {}
    for completion, request in zip(again, _each(requests[::-1]), strict=True):
        by_request.setdefault(id(request), []).append(completion.token_ids)
    for request in requests:
        own = [c for c, r in zip(first, _each(requests), strict=True) if r is request]
        assert_same_answers([request], tokens(own), by_request[id(request)])


def _each(requests):
    return [request for request in requests for _ in range(request.params.n)]


def test_every_data_shard_serves(engines, rng):
    with engines.fresh(replace(CROWDED, mesh=MeshShape(data=4, model=2))) as engine:
        used = np.zeros(4, int)
        schedule = engine._scheduler.schedule

        def watch(now):
            plan = schedule(now)
            if plan is not None:
                used[:] += [len(part.rows) for part in plan.parts]
            return plan

        engine._scheduler.schedule = watch
        engine.generate(requests_of(rng, 16))
    # Equal shares but for what the requests' lengths make of them.
    assert used.min() > 0.4 * used.max()


def test_a_lease_is_decoded_where_its_pages_are(engines, rng):
    requests = requests_of(rng, 6)
    expected = tokens(engines.get(MAIN).generate(requests))
    with engines.fresh(replace(CROWDED, mesh=MeshShape(data=2))) as engine:
        streams = [engine.prefill(request, 60.0) for request in requests]
        firsts = [sum((event.token_ids for event in stream), ()) for stream in streams]
        for request, stream, first, whole in zip(requests, streams, firsts, expected, strict=True):
            handle = stream.handle
            rest = engine.decode(handle.handle_id, handle.epoch, "", None)
            ids = first + sum((event.token_ids for event in rest), ())
            assert_same_answers([request], [ids], [whole])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_requests": 7}, "max_requests=7 for 2 data shards.*multiple of 2; try 8"),
        ({"max_batch_tokens": 65}, "max_batch_tokens=65"),
        ({"num_pages": 63}, "num_pages=63"),
        ({"max_requests": 2}, "max_requests=2; it must be at least 4"),
    ],
)
def test_what_shards_cannot_share_equally_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(
            **{"max_requests": 8, "max_batch_tokens": 64, **values}, mesh=MeshShape(data=2)
        )


def test_a_mesh_of_more_devices_than_there_are_says_which_would_do(engines):
    config = replace(MAIN, mesh=MeshShape(data=4, model=4))
    with pytest.raises(ConfigError, match=r"needs 16 devices; there are 8.*data=2,model=4 or"):
        Engine.load(engines.checkpoint, config)
