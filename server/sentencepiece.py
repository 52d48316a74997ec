"""SentencePiece's BPE as an encoder of the tokenizers library.

What follows from pieces, scores and types is here, whichever file they came from; a space is
U+2581 in a piece. Source: Kudo and Richardson, "SentencePiece" (2018).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby, pairwise
from math import inf, isfinite

from tokenizers import AddedToken, Tokenizer, models, normalizers

from pallasite.engine.errors import ConfigError
from pallasite.server.tokenizer_parts import SPACE

# Known pieces have up to 48; the work of finding a piece's parts grows with the square.
MAX_PIECE_LEN = 512


class PieceType(IntEnum):
    """What a piece is for, as both SentencePiece's own files and GGUF number it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A vocabulary, one entry an id.

    Attributes:
        texts: the pieces, each once.
        types: of `PieceType`.
        scores: the better, the sooner a piece is put together.
        unknown_id: stands for what no piece spells, or None.
    """

    texts: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    unknown_id: int | None


def build_encoder(pieces: Pieces, *, puts_space_in_front: bool) -> Tokenizer:
    """Builds an encoder that knows the pieces of every type but CONTROL, which no text becomes.

    It may put a space in front of each text that it is given, which decoding then takes away. What
    is joined to an UNUSED piece stays one; `splits_of_unused` cuts it. Raises ConfigError for a
    vocabulary that contradicts itself.
    """
    texts = [
        text.replace(SPACE, " ") if piece_type == PieceType.USER_DEFINED else text
        for text, piece_type in zip(pieces.texts, pieces.types, strict=True)
    ]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise _damaged(f"{len(texts) - len(vocab)} repeated pieces", "each only once")
    if not all(map(isfinite, pieces.scores)):
        raise _damaged("a score that is not finite", "a number for each piece")
    num_bytes = sum(piece_type == PieceType.BYTE for piece_type in pieces.types)
    if num_bytes not in (0, 256):
        raise _damaged(f"{num_bytes} byte pieces", "256 of them, or none")
    encoder = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces),
            unk_token=None if pieces.unknown_id is None else pieces.texts[pieces.unknown_id],
            fuse_unk=True,
            byte_fallback=num_bytes == 256,
        )
    )
    steps = [normalizers.Prepend(SPACE)] if puts_space_in_front else []
    encoder.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    # Found in what the normalizer makes of the text, so that U+2581 there is a space; but where it
    # makes a space in front, it would make one in front of these too: in the text as written.
    encoder.add_tokens(
        [
            AddedToken(text, special=False, normalized=not puts_space_in_front)
            for text, piece_type in zip(texts, pieces.types, strict=True)
            if piece_type == PieceType.USER_DEFINED
        ]
    )
    return encoder


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Returns each way to put a piece together, best first.

    SentencePiece joins the neighbours whose union has the best score, and of equals the leftmost.
    As a list of merges that is every split of every piece into two, ordered by the whole's score.
    What is joined from the left grows there, so that of equals the one with the longest left part
    is leftmost: in runs of spaces, which may have one score for all lengths. No piece that a user
    defined takes part: it is found whole before, or not at all.
    """
    joinable = _joinable(pieces)
    if joinable and (longest := max(map(len, joinable))) > MAX_PIECE_LEN:
        raise _damaged(f"a piece of {longest} characters", f"pieces of {MAX_PIECE_LEN} at most")
    merges: list[tuple[str, str]] = []
    num_groups = num_joined = 0
    for _, group in groupby(sorted(joinable, key=lambda text: -joinable[text]), key=joinable.get):
        splits: list[tuple[str, str]] = []
        for text in group:
            num_before = len(splits)
            for cut in range(len(text) - 1, 0, -1):
                left, right = text[:cut], text[cut:]
                if left in joinable and right in joinable:
                    splits.append((left, right))
            num_joined += len(splits) > num_before
        splits.sort(key=lambda split: (-len(split[0]), -len(split[1])))
        merges += splits
        num_groups += bool(splits)
    if num_groups == 1 and num_joined > 1:
        raise _damaged(
            f"{num_joined} joined pieces that all have one score",
            "scores that say which is joined first",
        )
    return merges


def splits_of_unused(pieces: Pieces) -> dict[int, tuple[int, ...]]:
    """Returns what each UNUSED piece that text may be joined to is cut into again, in the end.

    It is the two pieces that it was joined of, those cut likewise. How a piece was joined depends
    on nothing around it: had a neighbour joined a part of it first, it would not be there.
    """
    joinable = _joinable(pieces)
    ids = {text: token_id for token_id, text in enumerate(pieces.texts)}
    splits: dict[int, tuple[int, ...]] = {}
    unused = (text for text in joinable if pieces.types[ids[text]] == PieceType.UNUSED)
    for text in sorted(unused, key=len):
        pair = [ids[part] for part in _joined_of(text, joinable)]
        if len(pair) == 2:
            splits[ids[text]] = tuple(
                token_id for part in pair for token_id in splits.get(part, (part,))
            )
    return splits


def _joined_of(text: str, joinable: Mapping[str, float]) -> list[str]:
    """Returns the two parts that a text's characters are joined to last, or none."""
    parts = list(text)
    if not all(part in joinable for part in parts):
        return []
    scores = [joinable.get(left + right, -inf) for left, right in pairwise(parts)]
    while len(parts) > 2:
        if (best := max(scores)) == -inf:
            return []
        i = scores.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del scores[i]
        for j in range(max(0, i - 1), min(i + 1, len(scores))):
            scores[j] = joinable.get(parts[j] + parts[j + 1], -inf)
    return parts


def _joinable(pieces: Pieces) -> dict[str, float]:
    """Returns the scores of the pieces that text is joined to, and may be joined further from."""
    return {
        text: score
        for text, piece_type, score in zip(pieces.texts, pieces.types, pieces.scores, strict=True)
        if piece_type in (PieceType.NORMAL, PieceType.UNUSED)
    }


def _damaged(got: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"got a SentencePiece vocabulary with {got}; it must have {allowed}; convert or download"
        " the checkpoint again"
    )
