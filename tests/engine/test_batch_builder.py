"""The words of a step of two data shards: a batch of each, in its own slots and pages."""

import numpy as np

from pallasite.engine.batch_builder import BatchBuilder
from pallasite.engine.layout import Bucket, Layout
from pallasite.engine.plan import Plan, Row, make_part
from pallasite.engine.request import Request, SamplingParams
from pallasite.engine.sequence import State, new_group
from pallasite.engine.stream import TokenStream

BUCKET = Bucket(num_tokens=12, num_rows=3)
LAYOUT = Layout(bucket=BUCKET, pages_per_request=4, num_bans=5)
EOS = (1,)


def sequence_at(shard, slot, pages, prompt, adapter_slot=-1, **params):
    """A running sequence as the scheduler leaves it."""
    request = Request(prompt_ids=tuple(prompt), params=SamplingParams(**params))
    [sequence] = new_group(request, TokenStream("r"), 0, None).sequences
    sequence.state, sequence.shard, sequence.slot, sequence.pages = (
        State.RUNNING,
        shard,
        slot,
        pages,
    )
    sequence.adapter_slot = adapter_slot
    return sequence


def row_of(sequence, start, num_tokens, takes_previous=False):
    return Row(
        sequence=sequence,
        slot=sequence.slot,
        start=start,
        num_tokens=num_tokens,
        samples=start + num_tokens >= sequence.num_prompt,
        takes_previous=takes_previous,
    )


def words_of(builder, *parts):
    for rows in parts:
        for row in rows:
            builder.admit(row.sequence)
    plan = Plan(parts=[make_part(rows, []) for rows in parts])
    return builder.build(plan, BUCKET, EOS)


def two_parts():
    """Slots and pages that both shards have, of other requests."""
    first = [
        row_of(sequence_at(0, 1, [5, 2], range(10, 16), 2, temperature=0.5, seed=3), 0, 6),
        row_of(sequence_at(0, 0, [1], range(20, 23), min_tokens=9, logprobs=4), 3, 1, True),
    ]
    second = [
        row_of(sequence_at(1, 1, [2, 5], range(30, 37), 0, top_k=7, prompt_logprobs=0), 0, 5),
        row_of(sequence_at(1, 0, [0, 1, 3], range(40, 49), 1, bad_words=((8,),)), 9, 1, True),
    ]
    return first, second


def test_each_shards_words_are_those_of_its_part_alone():
    first, second = two_parts()
    words = words_of(BatchBuilder({BUCKET: LAYOUT}, 2, 2), first, second)
    assert words.shape == (2, LAYOUT.num_words)
    assert words.dtype == np.int32
    [alone] = words_of(BatchBuilder({BUCKET: LAYOUT}, 1, 2), first)
    np.testing.assert_array_equal(words[0], alone)
    for row in second:
        row.sequence.shard = 0
    [alone] = words_of(BatchBuilder({BUCKET: LAYOUT}, 1, 2), second)
    np.testing.assert_array_equal(words[1], alone)


def test_slots_pages_tokens_and_sampling_are_each_shards_own():
    views = [LAYOUT.views(w) for w in words_of(BatchBuilder({BUCKET: LAYOUT}, 2, 2), *two_parts())]
    expected = {
        "slot": [[0, 1, 0], [0, 1, 0]],
        "query_starts": [[0, 1, 7, 7], [0, 1, 6, 6]],
        "kv_lens": [[4, 6, 0], [10, 5, 0]],
        "takes_previous": [[1, 0, 0], [1, 0, 0]],
        "adapter_slot": [[-1, 2, -1], [1, 0, -1]],
        "samples": [[1, 1, 0], [1, 0, 0]],
        "temperature": [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]],
        "top_k": [[0, 0, 0], [0, 7, 0]],
        "num_logprobs": [[4, -1, -1], [-1, -1, -1]],
        "token_ids": [[0, *range(10, 16), *[0] * 5], [0, *range(30, 35), *[0] * 6]],
        "targets": [[0] * 12, [0, *range(31, 36), *[0] * 6]],
        "num_requests": [2, 2],
        "num_decode": [1, 1],
        "wants_scores": [0, 1],
    }
    for name, values in expected.items():
        for view, value in zip(views, values, strict=True):
            np.testing.assert_array_equal(view[name], value, err_msg=name)
    tables = [[view["page_table"][0, :n].tolist() for view, n in zip(views, (1, 3), strict=True)]]
    tables += [[view["page_table"][1, :2].tolist() for view in views]]
    assert tables == [[[1], [0, 1, 3]], [[5, 2], [2, 5]]]
    bans = [[pair for pair in view["bans"][0].tolist() if pair != [-1, -1]] for view in views]
    assert bans == [[[-1, 1]], [[-1, 8]]]


def test_a_part_without_rows_is_a_batch_of_no_request():
    first, _ = two_parts()
    words = words_of(BatchBuilder({BUCKET: LAYOUT}, 3, 2), [], first, [])
    for shard in (0, 2):
        views = LAYOUT.views(words[shard])
        minus = {name: views.pop(name) for name in ("bans", "num_logprobs", "adapter_slot")}
        assert all((field == -1).all() for field in minus.values())
        assert views.pop("num_steps") == 1, "all shards go round as often"
        assert {name: field.any() for name, field in views.items()} == dict.fromkeys(views, False)
    assert LAYOUT.views(words[1])["num_requests"] == 2
