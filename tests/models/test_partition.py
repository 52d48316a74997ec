"""The layout of a model over devices, against what its docstring promises, for any head counts.

The layouts are read as lists of the model's own heads, device by device; nothing here computes a
layout, so that any that keeps the promises would pass.
"""

import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from pallasite.models.partition import Axis, Partition, group_unit
from tests.tiny_checkpoints import TINY

DEVICES = (1, 2, 3, 4, 6, 8)
PADDING = -1


@st.composite
def partitions(draw, units=(1,)):
    """Any model's numbers over some devices; those of both sorts of layout often."""
    num_kv_heads = draw(st.integers(1, 20))
    config = replace(
        TINY,
        num_kv_heads=num_kv_heads,
        num_query_heads=num_kv_heads * draw(st.integers(1, 12)),
        head_width=2 * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 400)),
        ffn_width=draw(st.integers(1, 400)),
    )
    return Partition(
        config=config, num_parts=draw(st.sampled_from(DEVICES)), unit=draw(st.sampled_from(units))
    )


def partition_of(num_query_heads, num_kv_heads, num_parts, **changes):
    config = replace(
        TINY, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads, head_width=4, **changes
    )
    return Partition(config=config, num_parts=num_parts)


def sources(axis):
    """Each held entry's own one in the model, by number."""
    own = np.arange(axis.size) if axis.sources is None else axis.sources
    assert own.shape == (axis.size,)
    return own


def heads_by_device(partition, name):
    """The model's heads that each device holds, in order; None for one of padding.

    That the entries of a held head are those of one head of the model, in their order, is checked.
    """
    config, width = partition.config, partition.config.head_width
    has = {"query_heads": config.num_query_heads, "kv_heads": config.num_kv_heads}[name]
    axis = partition.axis(name, has * width)
    assert axis.size % (width * partition.num_parts) == 0
    heads = []
    for entries in sources(axis).reshape(-1, width):
        if (entries == PADDING).all():
            heads.append(None)
            continue
        head = int(entries[0]) // width
        np.testing.assert_array_equal(entries, head * width + np.arange(width))
        assert 0 <= head < has
        heads.append(head)
    each = len(heads) // partition.num_parts
    return [heads[at : at + each] for at in range(0, len(heads), each)]


@given(partitions())
def test_every_query_head_is_held_once_beside_its_key_head(partition):
    config = partition.config
    group = config.num_query_heads // config.num_kv_heads
    queries = heads_by_device(partition, "query_heads")
    keys = heads_by_device(partition, "kv_heads")
    held = [head for device in queries for head in device if head is not None]
    assert sorted(held) == list(range(config.num_query_heads))
    assert {head for device in keys for head in device} >= set(range(config.num_kv_heads))
    for own_queries, own_keys in zip(queries, keys, strict=True):
        # The op's own rule, on one device: query head n reads key head n // (N / K).
        assert len(own_queries) % len(own_keys) == 0
        own_group = len(own_queries) // len(own_keys)
        served = {index // own_group for index, head in enumerate(own_queries) if head is not None}
        # No copy of a key head is made for nobody.
        assert served == {index for index, head in enumerate(own_keys) if head is not None}
        for index, head in enumerate(own_queries):
            if head is not None:
                assert own_keys[index // own_group] == head // group


@given(partitions())
def test_a_device_holds_no_more_key_heads_than_it_must(partition):
    config, num_parts = partition.config, partition.num_parts
    for own in heads_by_device(partition, "kv_heads"):
        assert len(own) == math.ceil(config.num_kv_heads / num_parts)
        held = [head for head in own if head is not None]
        assert len(set(held)) == len(held)  # a copy beside its original would serve nobody
    assert partition.num_kv_heads == num_parts * math.ceil(config.num_kv_heads / num_parts)


@given(partitions())
def test_copies_of_key_heads_share_out_the_queries_as_well_as_can_be(partition):
    """With as few key heads a device, no number of copies leaves it fewer query heads."""
    config, num_parts = partition.config, partition.num_parts
    group = config.num_query_heads // config.num_kv_heads
    own_keys = math.ceil(config.num_kv_heads / num_parts)
    fewest = min(
        own_keys * math.ceil(group / copies)
        for copies in range(1, num_parts + 1)
        if config.num_kv_heads * copies <= own_keys * num_parts
    )
    assert partition.num_query_heads == num_parts * fewest
    assert {len(own) for own in heads_by_device(partition, "query_heads")} == {fewest}


@given(partitions())
def test_the_counts_of_heads_are_those_of_the_layout(partition):
    width = partition.config.head_width
    for name, count, has in (
        ("query_heads", partition.num_query_heads, partition.config.num_query_heads),
        ("kv_heads", partition.num_kv_heads, partition.config.num_kv_heads),
    ):
        assert partition.axis(name, has * width).size == count * width
        # An axis of heads alone, as adapters or biases a head may have it.
        assert partition.axis(name, has).size == count
    held = [head for own in heads_by_device(partition, "kv_heads") for head in own]
    copies = [held.count(head) for head in range(partition.config.num_kv_heads)]
    assert set(copies) == {partition.num_copies}


@given(partitions(), st.sampled_from(["vocab", "ffn"]), st.integers(1, 400))
def test_other_axes_keep_their_order_and_are_padded_by_less_than_an_entry_a_device(
    partition, name, size
):
    axis = partition.axis(name, size)
    assert axis.size % partition.num_parts == 0
    assert 0 <= axis.size - size < partition.num_parts
    np.testing.assert_array_equal(sources(axis)[:size], np.arange(size))
    assert (sources(axis)[size:] == PADDING).all()


@given(partitions(units=(1, 2, 16, 32, 48)), st.integers(1, 400))
def test_a_part_of_the_feed_forward_is_whole_units(partition, size):
    unit, num_parts = partition.unit, partition.num_parts
    axis = partition.axis("ffn", size)
    if num_parts == 1:
        # Nothing is cut: padding would only hide a group that does not divide the inputs.
        assert (axis.size, axis.sources) == (size, None)
        return
    assert axis.size % (num_parts * unit) == 0
    assert 0 <= axis.size - size < num_parts * unit
    np.testing.assert_array_equal(sources(axis)[:size], np.arange(size))
    assert (sources(axis)[size:] == PADDING).all()
    # The unit is the feed-forward's alone.
    assert partition.axis("vocab", size).size - size < num_parts


@given(partitions(), st.sampled_from(["layers", "width", "group", "head", "page", "pages"]))
def test_an_axis_that_the_model_axis_does_not_cut_stays_as_it_is(partition, name):
    assert partition.axis(name, 7) == Axis(7)


@given(st.sampled_from(DEVICES), *[st.integers(1, 6)] * 4)
def test_an_even_division_changes_nothing(num_parts, kv_heads, group, vocab, ffn):
    kv_heads, vocab, ffn = kv_heads * num_parts, vocab * num_parts, ffn * num_parts
    partition = partition_of(kv_heads * group, kv_heads, num_parts, vocab_size=vocab, ffn_width=ffn)
    assert partition.num_copies == 1
    assert partition.notes() == []
    values = np.arange(4 * kv_heads * group)
    for name, size in (
        ("kv_heads", 4 * kv_heads),
        ("query_heads", 4 * kv_heads * group),
        ("vocab", vocab),
        ("ffn", ffn),
    ):
        axis = partition.axis(name, size)
        assert (axis.size, axis.sources) == (size, None)
        assert axis.lay_out(values[:size], 0).nbytes == values[:size].nbytes


@given(partitions())
def test_notes_say_what_is_padded_or_copied_and_nothing_else(partition):
    config, num_parts, notes = partition.config, partition.num_parts, partition.notes()
    queries = heads_by_device(partition, "query_heads")
    keys = heads_by_device(partition, "kv_heads")
    sizes = {
        "query heads": (config.num_query_heads, sum(map(len, queries))),
        "rows of the vocabulary": (
            config.vocab_size,
            partition.axis("vocab", config.vocab_size).size,
        ),
        "feed-forward channels": (config.ffn_width, partition.axis("ffn", config.ffn_width).size),
    }
    expected = {
        f"{has} {what} are padded to {holds} for {num_parts} devices"
        for what, (has, holds) in sizes.items()
        if has != holds
    }
    held = [head for own in keys for head in own if head is not None]
    if None in [head for own in keys for head in own]:
        total = sum(map(len, keys))
        expected.add(f"{len(held)} key heads are padded to {total} for {num_parts} devices")
    if len(held) > config.num_kv_heads:
        copies = len(held) // config.num_kv_heads
        expected.add(
            f"{copies} devices hold each of the {config.num_kv_heads} key heads, since {num_parts}"
            " devices do not divide them"
        )
    assert len(notes) == len(expected)
    assert set(notes) == expected


@pytest.mark.parametrize(
    ("heads", "queries", "keys"),
    [
        # Those that the module's docstring draws.
        ((6, 3, 2), [[0, 1, 2, 3], [4, 5, None, None]], [[0, 1], [2, None]]),
        ((4, 1, 2), [[0, 1], [2, 3]], [[0], [0]]),
        # SmolLM2-135M: nine heads over three.
        ((9, 3, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0], [1], [2]]),
        ((9, 3, 4), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [None] * 3], [[0], [1], [2], [None]]),
        ((3, 1, 2), [[0, 1], [2, None]], [[0], [0]]),
        ((8, 2, 4), [[0, 1], [2, 3], [4, 5], [6, 7]], [[0], [0], [1], [1]]),
    ],
)
def test_layouts_as_they_are_drawn(heads, queries, keys):
    partition = partition_of(*heads)
    assert heads_by_device(partition, "query_heads") == queries
    assert heads_by_device(partition, "kv_heads") == keys


def test_the_whole_text_of_the_notes():
    partition = partition_of(3, 1, 2, vocab_size=131, ffn_width=57)
    assert partition.notes() == [
        "2 devices hold each of the 1 key heads, since 2 devices do not divide them",
        "3 query heads are padded to 4 for 2 devices",
        "131 rows of the vocabulary are padded to 132 for 2 devices",
        "57 feed-forward channels are padded to 58 for 2 devices",
    ]


@given(
    partitions(units=(1, 16)),
    st.sampled_from(["vocab", "ffn", "query_heads", "kv_heads"]),
    st.integers(0, 2),
    st.sampled_from([np.float32, np.int8, np.uint8, np.float16]),
)
def test_laid_out_values_are_the_models_own_and_padding_is_zero(partition, name, dim, dtype):
    config = partition.config
    size = {
        "vocab": config.vocab_size,
        "ffn": config.ffn_width,
        "query_heads": config.num_query_heads * config.head_width,
        "kv_heads": config.num_kv_heads * config.head_width,
    }[name]
    shape = [2, 3, 2]
    shape[dim] = size
    # No value is 0, so that padding shows.
    values = (np.arange(math.prod(shape)) % 100 + 1).reshape(shape).astype(dtype)
    before = values.copy()
    axis = partition.axis(name, size)
    for at in (dim, dim - 3):
        laid_out = axis.lay_out(values, at)
        assert laid_out.dtype == dtype
        shape[dim] = axis.size
        assert laid_out.shape == tuple(shape)
        for entry, source in enumerate(sources(axis)):
            own = laid_out.take(entry, axis=dim)
            expected = np.zeros_like(own) if source == PADDING else values.take(source, axis=dim)
            np.testing.assert_array_equal(own, expected)
    np.testing.assert_array_equal(values, before)


@given(st.lists(st.none() | st.integers(1, 24), max_size=3))
@example(groups=[])
@example(groups=[None])
@example(groups=[32, None, 48])
def test_the_unit_is_the_least_that_every_group_divides(groups):
    unit = group_unit(groups, 1 << 40, 1)
    sizes = [group for group in groups if group is not None]
    assert all(unit % size == 0 for size in sizes)
    smaller = (n for n in range(1, unit) if all(n % size == 0 for size in sizes))
    assert next(smaller, None) is None


@pytest.mark.parametrize(
    ("groups", "num_parts", "unit"),
    [([128], 8, 128), ([128, 96], 2, 384), ([14336], 1, 14336), ([14336], 2, 1), ([8192], 2, 8192)],
)
def test_groups_too_wide_to_pad_for_are_left_to_be_refused(groups, num_parts, unit):
    """14,336 channels: two groups of 8,192 are 1.14 times as many, two of 14,336 twice."""
    assert group_unit(groups, 14336, num_parts) == unit
