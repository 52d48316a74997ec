"""What parity is measured by, and the limits it is held to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_LOGIT_DIFFERENCE = 2e-3
"""Of f32 weights, over every logit."""

MAX_LOGPROB_DIFFERENCE = 0.012
"""Of bf16 weights, the mean over tokens of the absolute difference of their log-probability."""

MIN_TOP_AGREEMENT = 0.995
"""Of bf16 weights, the share of positions with the same likeliest token."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model says of a text of T tokens.

    Attributes:
        logprobs: [T - 1], the log-probability of each token but the first, given those before.
        top: [T - 1], the likeliest token at the same places.
    """

    logprobs: np.ndarray
    top: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, token_ids: np.ndarray) -> "Scores":
        """Takes them from logits [T, V]."""
        x = logits[:-1].astype(np.float64)
        x -= x.max(axis=-1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
        rows = np.arange(len(x))
        return cls(logprobs=x[rows, token_ids[1:]], top=x.argmax(axis=-1))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two models' scores of the same texts differ.

    Attributes:
        num_positions: tokens scored.
        logprob_difference: the mean absolute difference of their log-probabilities.
        standard_error: of that mean.
        num_top_differences: positions where the likeliest tokens differ.
    """

    num_positions: int
    logprob_difference: float
    standard_error: float
    num_top_differences: int

    @classmethod
    def of(cls, ours: Sequence[Scores], theirs: Sequence[Scores]) -> "Agreement":
        pairs = list(zip(ours, theirs, strict=True))
        differences = np.concatenate([np.abs(a.logprobs - b.logprobs) for a, b in pairs])
        return cls(
            num_positions=len(differences),
            logprob_difference=float(differences.mean()),
            standard_error=float(differences.std() / np.sqrt(len(differences))),
            num_top_differences=sum(int((a.top != b.top).sum()) for a, b in pairs),
        )

    @property
    def top_agreement(self) -> float:
        return 1 - self.num_top_differences / self.num_positions

    def __str__(self) -> str:
        return (
            f"mean |difference of log-probability| {self.logprob_difference:.5f}"
            f" (standard error {self.standard_error:.5f}), top-1 agreement"
            f" {self.top_agreement:.2%} ({self.num_top_differences} of {self.num_positions} differ)"
        )


def chunks_of(num_tokens: int, size: int) -> list[int]:
    """Returns num_tokens cut into chunks of `size` and a rest."""
    rest = [num_tokens % size] if num_tokens % size else []
    return [size] * (num_tokens // size) + rest
