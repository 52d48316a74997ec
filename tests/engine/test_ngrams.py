"""Drafts from a sequence's own tokens, held against a search of the whole sequence."""

import time

from hypothesis import given
from hypothesis import strategies as st

from pallasite.engine.ngrams import LONGEST, SHORTEST, Match, NgramIndex, continuation


def search(token_ids):
    """The definition: the longest n-gram at the end that stood before, where it stood last."""
    for ngram_len in range(LONGEST, SHORTEST - 1, -1):
        last = token_ids[-ngram_len:]
        for place in range(len(token_ids) - 1, ngram_len - 1, -1):
            if token_ids[place - ngram_len : place] == last and len(last) == ngram_len:
                return Match(ngram_len=ngram_len, place=place)
    return None


def copied(token_ids, place, count):
    """The definition: one token after the other, copied from what is there by then."""
    grown = list(token_ids)
    for offset in range(count):
        grown.append(grown[place + offset])
    return tuple(grown[len(token_ids) :])


SEQUENCES = st.lists(st.integers(0, 3), max_size=40)


@given(SEQUENCES, st.lists(st.integers(1, 7), max_size=12))
def test_a_growing_sequence_finds_what_a_search_finds(token_ids, pieces):
    index, end = NgramIndex(), 0
    for piece in pieces:
        end += piece
        known = token_ids[:end]
        assert index.find(known) == search(known)
        assert index.find(known) == search(known), "asking twice changes nothing"


@given(SEQUENCES.filter(bool), st.integers(0, 9), st.data())
def test_a_draft_is_copied_token_by_token(token_ids, count, data):
    place = data.draw(st.integers(0, len(token_ids) - 1))
    assert continuation(token_ids, place, count) == copied(token_ids, place, count)


def test_the_longest_ngram_wins_and_then_the_latest_place():
    #      0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    ids = [1, 2, 3, 4, 5, 9, 3, 4, 6, 9, 3, 4, 7, 3, 4]
    assert NgramIndex().find(ids) == Match(ngram_len=2, place=12)
    ids = [1, 2, 3, 4, 5, 9, 3, 4, 6, 0, 1, 2, 3, 4]
    assert NgramIndex().find(ids) == Match(ngram_len=4, place=4)
    assert continuation(ids, 4, 3) == (5, 9, 3)
    assert NgramIndex().find([1]) is None
    assert NgramIndex().find([]) is None


def test_a_token_costs_the_same_in_a_long_sequence():
    index, token_ids = NgramIndex(), [(i * i) % 50021 for i in range(100_000)]
    index.find(token_ids)
    start = time.process_time()
    for token_id in range(1000):
        token_ids.append(token_id)
        index.find(token_ids)
    assert time.process_time() - start < 0.5, "a rescan would take minutes"
