"""However a prompt is computed, and however few pages there are, its tokens are the same."""

import asyncio
from dataclasses import replace

from pallasite.server import client as door_client
from tests.engine.answers import assert_same_answers
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
    count = repetitions(16, 500)
    requests = []
    for _ in range(count):
        # Three such prompts fit into the pool together, and no two of them whole.
        prompt = random_prompt(rng, int(rng.integers(60, 80)))
        max_tokens = int(rng.integers(140, 160))
        requests.append(greedy(prompt, max_tokens=max_tokens, ignore_eos=True))
    large, small = engines.get(MAIN), engines.get(TIGHT)
    pages = [-(-(len(r.prompt_ids) + r.params.max_tokens) // 16) for r in requests]
    demand = TIGHT.max_requests * sum(pages) / count
    assert TIGHT.num_pages < 0.3 * demand
    before = small.metrics.num_preemptions
    ours, theirs = tokens(small.generate(requests)), tokens(large.generate(requests))
    num_ties = assert_same_answers(requests, ours, theirs)
    num_preemptions = small.metrics.num_preemptions - before
    assert num_preemptions > repetitions(8, 250)
    figures(
        requests=count,
        pool_to_demand=round(TIGHT.num_pages / demand, 2),
        preemptions=num_preemptions,
        differences=0,
        ties=num_ties,
    )


async def test_every_way_to_compute_a_prompt_gives_the_same_tokens(
    engines, door, rng, repetitions, figures
):
    count = repetitions(24, 200)
    lengths = [int(rng.integers(1, 150)) for _ in range(count)]
    prompts = [random_prompt(rng, length) for length in lengths]
    engine, tight = engines.get(MAIN), engines.get(TIGHT)
    before = tight.metrics.num_preemptions

    def asked(n=1):
        return [greedy(p, max_tokens=24, n=n) for p in prompts]

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

    alone = tokens(one_by_one(engine, asked()))
    ways = {
        "batched": tokens(engine.generate(asked())),
        "in chunks and preempted": tokens(tight.generate(asked())),
        "prefilled, then decoded": list(leased()),
    }
    async with door(engine) as client:
        ways["over gRPC"] = await asyncio.gather(*[over_grpc(client, p) for p in prompts])
    num_ties = 0
    for answers in ways.values():
        num_ties += assert_same_answers(asked(), answers, alone)
    shared, twice = tokens(engine.generate(asked(n=2))), [ids for ids in alone for _ in range(2)]
    num_ties += assert_same_answers(asked(n=2), shared, twice)

    drawn = [
        replace(r, params=replace(r.params, temperature=1.0, top_p=0.95, seed=i))
        for i, r in enumerate(asked(n=2))
    ]
    once = tokens(engine.generate(drawn))
    for again in (tokens(engine.generate(drawn)), tokens(tight.generate(drawn))):
        num_ties += assert_same_answers(drawn, again, once)
    assert len(set(alone)) > 0.9 * count, "answers depend on their prompts"
    preemptions = tight.metrics.num_preemptions - before
    figures(prompts=count, ways=7, preemptions=preemptions, differences=0, ties=num_ties)
