"""The results of a step of two data shards go to the rows that asked for them."""

import numpy as np

from pallasite.engine.commit import Committer
from pallasite.engine.dispatcher import Dispatcher
from pallasite.engine.request import Request, SamplingParams
from pallasite.engine.sampler import NOT_FINITE
from pallasite.engine.sequence import State, new_group
from pallasite.engine.step import RESULT_WIDTH
from pallasite.engine.stream import TokenStream

EOS, B, T = 1, 4, 64


def running(*lengths, **params):
    """Two shards on which prompts of these lengths have just been planned, and that plan."""
    dispatcher = Dispatcher(2, 64, 4, 2 * B, 2 * T)
    sequences = []
    for arrival, length in enumerate(lengths):
        request = Request(prompt_ids=tuple(range(length)), params=SamplingParams(**params))
        sequences += new_group(request, TokenStream(str(arrival)), arrival, None).sequences
        dispatcher.add(sequences[-1])
    return dispatcher, sequences, dispatcher.schedule(0.0)


def no_lease(sequence, lease_s):
    raise AssertionError("nobody asked for one")


def some_results():
    """A token of its own for each row of each shard, and for each row that no request has."""
    results = np.zeros((2, B, RESULT_WIDTH), np.int32)
    results[:, :, 0] = 100 + np.arange(2 * B).reshape(2, B)
    return results


def test_each_row_gets_its_own_shards_result():
    dispatcher, sequences, plan = running(9, 20, 3, 1)
    assert [s.shard for s in sequences] == [0, 1, 0, 0]
    assert [row.sequence for row in plan.rows] == [sequences[i] for i in (3, 0, 2, 1)]
    results = some_results()
    committer = Committer(dispatcher, (EOS,), 1000)
    assert committer.commit(plan, results, None, no_lease) == 4
    assert [s.token_ids[-1] for s in sequences] == [101, 104, 102, 100]
    assert [s.num_completed for s in sequences] == [1] * 4
    assert len(committer.take_touched()) == 4


def test_a_stop_and_a_fault_end_the_row_of_that_shard_alone():
    dispatcher, sequences, plan = running(9, 20, 3, 4)
    assert [s.shard for s in sequences] == [0, 1, 0, 0]
    results = some_results()
    results[1, 0, 0] = EOS
    results[0, 1, 1] = NOT_FINITE
    committer = Committer(dispatcher, (EOS,), 1000)
    assert committer.commit(plan, results, None, no_lease) == 2
    assert [row.sequence for row in plan.parts[0].rows] == [sequences[i] for i in (0, 2, 3)]
    ended = [s.state is State.FINISHED for s in sequences]
    assert ended == [False, True, True, False]
    assert dispatcher.pools[1].num_free == 32
    assert dispatcher.pools[0].num_free == 32 - 3 - 1


def test_prompt_scores_are_taken_from_the_tokens_of_ones_own_shard():
    dispatcher, sequences, plan = running(5, 7, 1, 3, prompt_logprobs=0, logprobs=0)
    assert [s.shard for s in sequences] == [0, 1, 0, 0]
    spans = [0, 1, 6]  # of the rows of shard 0: lengths 1, 5, 3
    assert [row.num_tokens for row in plan.parts[0].rows] == [1, 5, 3]
    scores = np.zeros((2, T, RESULT_WIDTH), np.int32)
    scores[:, :, 0] = np.arange(2 * T).reshape(2, T)
    scores[:, :, 2] = np.arange(0, -2 * T, -1, np.float32).view(np.int32).reshape(2, T)
    committer = Committer(dispatcher, (EOS,), 1000)
    committer.commit(plan, some_results(), scores, no_lease)
    for index, start in ((2, spans[0]), (0, spans[1]), (3, spans[2]), (1, T)):
        [event] = sequences[index].group.stream._pending.values()
        first, *others = event.prompt_logprobs
        assert first is None
        places = range(start, start + sequences[index].num_prompt - 1)
        assert [entry.token_id for entry in others] == list(places)
        assert [entry.logprob for entry in others] == [-float(place) for place in places]
