"""What one sequence drafts, and how likely that is to be right, by what became of it before."""

from collections.abc import Sequence
from dataclasses import dataclass

from pallasite.engine.ngrams import LONGEST, SHORTEST, NgramIndex, continuation

FIRST_CHANCE = 0.5
"""What a sequence's first drafts are taken to be worth."""

LEARNING_RATE = 0.15
"""How far one token that came true, or did not, moves the chance of the next."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        token_ids: one or more, in order.
        chance: that a token is right, given that those before it are.
    """

    token_ids: tuple[int, ...]
    chance: float


class Drafter:
    """Drafts for one sequence, and learns from its tokens, whether drafts were verified or not."""

    def __init__(self) -> None:
        self._index = NgramIndex()
        self._chances = dict.fromkeys(range(SHORTEST, LONGEST + 1), FIRST_CHANCE)
        self._last: tuple[int, int, tuple[int, ...]] | None = None

    def draft(self, token_ids: Sequence[int], count: int) -> Draft | None:
        """Returns up to `count` >= 1 tokens that may follow, or None where nothing repeats.

        `token_ids` are those of the calls before and any more.
        """
        self._learn(token_ids)
        match = self._index.find(token_ids)
        if match is None:
            self._last = None
            return None
        drafted = continuation(token_ids, match.place, count)
        self._last = (match.ngram_len, len(token_ids), drafted)
        return Draft(token_ids=drafted, chance=self._chances[match.ngram_len])

    def _learn(self, token_ids: Sequence[int]) -> None:
        """Compares the last draft with what came instead, up to the first token that differs."""
        if self._last is None:
            return
        ngram_len, start, drafted = self._last
        for token_id, foreseen in zip(token_ids[start:], drafted, strict=False):
            is_right = token_id == foreseen
            self._chances[ngram_len] += LEARNING_RATE * (is_right - self._chances[ngram_len])
            if not is_right:
                return
