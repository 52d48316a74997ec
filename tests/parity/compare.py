"""Compares our SmolLM2 with transformers' on every text, over every logit, and prints the figures.

    python -m tests.parity.compare LOGITS [MODEL]

LOGITS is the folder that make_goldens.py wrote; MODEL is a pulled name or a file. Ends with status
1 where a figure is over its limit.
"""

import sys
from pathlib import Path

import numpy as np

from pallasite.models.pull import locate
from tests.parity.figures import (
    MAX_LOGIT_DIFFERENCE,
    MAX_LOGPROB_DIFFERENCE,
    MIN_TOP_AGREEMENT,
    Agreement,
    Scores,
    chunks_of,
)
from tests.parity.forward import Forward
from tests.parity.texts import TEXTS

CHUNK = 64


def main(logits: Path, model: str = "smollm2-135m") -> int:
    path = locate(model)
    largest, f32 = compare(Forward(path, "f32", CHUNK), logits)
    print(f"f32: largest |difference of logits| {largest:.2e}; {f32}\n")
    _, bf16 = compare(Forward(path, "bf16", CHUNK), logits)
    print(f"bf16: {bf16}\n")
    is_good = {
        f"f32: largest |difference of logits| < {MAX_LOGIT_DIFFERENCE}": largest
        < MAX_LOGIT_DIFFERENCE,
        f"bf16: mean |difference of log-probability| <= {MAX_LOGPROB_DIFFERENCE}": (
            bf16.logprob_difference <= MAX_LOGPROB_DIFFERENCE
        ),
        f"bf16: top-1 agreement >= {MIN_TOP_AGREEMENT:.1%}": (
            bf16.top_agreement >= MIN_TOP_AGREEMENT
        ),
    }
    for limit, is_kept in is_good.items():
        print(f"{limit}: {'kept' if is_kept else 'NOT KEPT'}")
    return 0 if all(is_good.values()) else 1


def compare(model: Forward, folder: Path) -> tuple[float, Agreement]:
    """Returns the largest difference of any logit, and the agreement over all texts."""
    largest = 0.0
    ours, theirs = [], []
    for name in TEXTS:
        with np.load(folder / f"{name}.npz") as golden:
            token_ids, expected = golden["token_ids"], golden["logits"]
        logits = model.logits(token_ids, chunks_of(len(token_ids), CHUNK))
        assert np.isfinite(logits).all()
        difference = float(np.abs(logits - expected).max())
        ours.append(Scores.of(logits, token_ids))
        theirs.append(Scores.of(expected, token_ids))
        agreement = Agreement.of(ours[-1:], theirs[-1:])
        print(f"{name:>10}: largest |difference of logits| {difference:.2e}; {agreement}")
        largest = max(largest, difference)
    return largest, Agreement.of(ours, theirs)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
