"""What may come next in a sequence, looked up among its own tokens (prompt lookup, Saxena 2023).

The longest n-gram that the sequence ends in and that stands in it before is found in a table, and
what followed it there is the draft. Knows token ids only; it decides nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST = 4
SHORTEST = 2


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where tokens repeat.

    Attributes:
        ngram_len: how many of the last tokens stood before.
        place: the index of the token that followed them, where they stood last.
    """

    ngram_len: int
    place: int


@dataclass(eq=False)
class NgramIndex:
    """Where each n-gram of a growing sequence was last followed by a token.

    A token costs as many entries as there are lengths, once, whatever the sequence's length.
    """

    _places: list[dict[tuple[int, ...], int]] = field(
        default_factory=lambda: [{} for _ in range(SHORTEST, LONGEST + 1)]
    )
    _num_tokens: int = 0

    def find(self, token_ids: Sequence[int]) -> Match | None:
        """Returns the match of the longest n-gram that token_ids end in, None where there is none.

        `token_ids` are those of the calls before and any more.
        """
        self._take_in(token_ids)
        for ngram_len in range(LONGEST, SHORTEST - 1, -1):
            last = tuple(token_ids[-ngram_len:])
            place = self._places[ngram_len - SHORTEST].get(last)
            if place is not None:
                return Match(ngram_len=ngram_len, place=place)
        return None

    def _take_in(self, token_ids: Sequence[int]) -> None:
        """Notes the n-grams that a token follows by now."""
        for ngram_len, places in enumerate(self._places, start=SHORTEST):
            first = max(ngram_len, self._num_tokens)
            known = token_ids[first - ngram_len :]
            ngrams = zip(*(known[offset:] for offset in range(ngram_len)), strict=False)
            places.update(zip(ngrams, range(first, len(token_ids)), strict=False))
        self._num_tokens = max(self._num_tokens, len(token_ids))


def continuation(token_ids: Sequence[int], place: int, count: int) -> tuple[int, ...]:
    """Returns the `count` tokens from `place` on, as if the sequence went on repeating them."""
    period = len(token_ids) - place
    return tuple(token_ids[place + offset % period] for offset in range(count))
