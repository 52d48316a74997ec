"""However a prompt is computed, and however few pages there are, its tokens are the same."""

import asyncio
from dataclasses import replace

from pallasite.server import client as door_client
from tests.engine.harness import (
    MAIN,
    TIGHT,
    greedy,
    one_by_one,
    random_prompt,
    tokens,
)


def test_a_pool_of_a_third_of_the_demand_gives_the_large_pools_tokens(
    engines, rng, repetitions, figures
):
    count = repetitions(40, 500)
    requests = []
    for _ in range(count):
        prompt = random_prompt(rng, int(rng.integers(110, 150)))
        max_tokens = int(rng.integers(80, 105))
        requests.append(greedy(prompt, max_tokens=max_tokens, ignore_eos=True))
    large, small = engines.get(MAIN), engines.get(TIGHT)
    pages = [-(-(len(r.prompt_ids) + r.params.max_tokens) // 16) for r in requests]
    demand = TIGHT.max_requests * sum(pages) / count
    assert TIGHT.num_pages < 0.3 * demand
    before = small.metrics.num_preemptions
    assert tokens(small.generate(requests)) == tokens(large.generate(requests))
    num_preemptions = small.metrics.num_preemptions - before
    assert num_preemptions > repetitions(8, 100)
    figures(
        requests=count,
        pool_to_demand=round(TIGHT.num_pages / demand, 2),
        preemptions=num_preemptions,
        differences=0,
    )


async def test_every_way_to_compute_a_prompt_gives_the_same_tokens(
    engines, door, rng, repetitions, figures
):
    count = repetitions(24, 200)
    lengths = [int(rng.integers(1, 150)) for _ in range(count)]
    prompts = [random_prompt(rng, length) for length in lengths]
    engine, tight = engines.get(MAIN), engines.get(TIGHT)
    before = tight.metrics.num_preemptions

    def generated(engine, **params):
        return tokens(engine.generate([greedy(p, max_tokens=24, **params) for p in prompts]))

    def leased():
        for prompt in prompts:
            first = engine.prefill(greedy(prompt, max_tokens=24), 30.0)
            ids = [i for event in first for i in event.token_ids]
            if first.handle is not None:
                rest = engine.decode(first.handle.handle_id, engine.epoch, "", None)
                ids += [i for event in rest for i in event.token_ids]
            yield tuple(ids)

    async def over_grpc(client, prompt):
        sampling = door_client.SamplingParams(max_tokens=24, temperature=0.0)
        stream = client.generate(list(prompt), sampling)
        return tuple([i async for event in stream for i in event.token_ids])

    alone = tokens(one_by_one(engine, [greedy(p, max_tokens=24) for p in prompts]))
    assert generated(engine) == alone, "batched"
    assert generated(tight) == alone, "in chunks and preempted"
    assert generated(engine, n=2) == [ids for ids in alone for _ in range(2)], "shared"
    assert list(leased()) == alone, "prefilled, then decoded"
    async with door(engine) as client:
        assert await asyncio.gather(*[over_grpc(client, p) for p in prompts]) == alone, "over gRPC"

    def seeded(engine):
        params = replace(greedy([0], max_tokens=24).params, temperature=1.0, top_p=0.95, n=2)
        requests = [
            replace(greedy(p), params=replace(params, seed=i)) for i, p in enumerate(prompts)
        ]
        return tokens(engine.generate(requests))

    assert seeded(engine) == seeded(engine) == seeded(tight)
    assert len(set(alone)) > 0.9 * count, "answers depend on their prompts"
    preemptions = tight.metrics.num_preemptions - before
    figures(prompts=count, ways=7, preemptions=preemptions, differences=0)
