"""Cancels at every stage: the slot is free within two steps and nobody else notices."""

import asyncio
import time

from pallasite.engine import FinishReason
from pallasite.server.client import SamplingParams
from tests.engine.answers import assert_same_answers
from tests.engine.harness import assert_quiet, greedy, random_prompt, recorded_plans, tokens

NUM_AT_ONCE = 10


def test_aborts_at_any_moment_free_the_slot_and_change_no_other(
    engine, rng, monkeypatch, repetitions, figures
):
    num_rounds = repetitions(10, 100)
    witnesses = [greedy(random_prompt(rng, 12 + i), max_tokens=60, ignore_eos=True) for i in (0, 9)]
    expected = tokens(engine.generate(witnesses))
    most_late, ends = 0, []
    for _ in range(num_rounds):
        with recorded_plans(engine, monkeypatch) as plans:
            beside = [engine.submit(witness) for witness in witnesses]
            victims = []
            for _ in range(NUM_AT_ONCE):
                length, n = int(rng.integers(1, 150)), int(rng.integers(1, 4))
                prompt = random_prompt(rng, length)
                victims.append(engine.submit(greedy(prompt, max_tokens=100, n=n, ignore_eos=True)))
            for index in rng.permutation(NUM_AT_ONCE):
                time.sleep(float(rng.exponential(0.003)))
                engine.abort(victims[index].request_id)
                num_plans = len(plans)
                finishes = [event.finish for event in victims[index] if event.finish]
                ends += [finish.reason for finish in finishes]
                stream = victims[index]
                late = [
                    any(row.sequence.group.stream is stream for row in plan.rows)
                    for plan in plans[num_plans:]
                ]
                most_late = max(most_late, sum(late))
            answers = [[i for event in stream for i in event.token_ids] for stream in beside]
            assert_same_answers(witnesses, answers, expected)
    assert most_late <= 2
    assert ends.count(FinishReason.ABORT) > 0.5 * len(ends)
    figures(aborts=num_rounds * NUM_AT_ONCE, most_steps_after=most_late, leaks=0)


async def test_streams_that_their_clients_cancel_free_the_slot_and_change_no_other(
    engine, door, rng, repetitions, figures
):
    num_rounds = repetitions(10, 100)
    sampling = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    witness_prompt = list(random_prompt(rng, 20))
    asked = greedy(witness_prompt, max_tokens=100, ignore_eos=True)

    async def ids_of(stream):
        return [token_id async for event in stream for token_id in event.token_ids]

    async def leave(client, prompt, events_read, pause_s):
        stream = client.generate(prompt, sampling)
        if not events_read:
            reading = asyncio.create_task(ids_of(stream))
            await asyncio.sleep(pause_s)
            stream.cancel()
            await reading
            return
        async for _ in stream:
            events_read -= 1
            if not events_read:
                stream.cancel()

    async with door(engine) as client:
        expected = await ids_of(client.generate(witness_prompt, sampling))
        assert len(expected) == 100
        for _ in range(num_rounds):
            witness = asyncio.create_task(ids_of(client.generate(witness_prompt, sampling)))
            leaving = [
                leave(
                    client,
                    list(random_prompt(rng, int(rng.integers(1, 150)))),
                    int(rng.integers(0, 12)),
                    float(rng.exponential(0.01)),
                )
                for _ in range(NUM_AT_ONCE)
            ]
            await asyncio.gather(*leaving)
            assert_same_answers([asked], [await witness], [expected])
            await asyncio.to_thread(assert_quiet, engine)
    figures(cancels=num_rounds * NUM_AT_ONCE, leaks=0)
