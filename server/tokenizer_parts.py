"""What a tokenizer is made of, whichever file it came from, and what every source shares.

A source (`tokenizer_gguf.py`, `tokenizer_hf.py`) builds the parts; `tokenizer.py` works with them
and knows no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import tokenizers

from pallasite.engine.errors import RequestError

# What SentencePiece writes for a space.
SPACE = "\u2581"


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """An encoder and what its own library does not know of it.

    Attributes:
        encoder: the library's tokenizer, special tokens added, without truncation or padding.
        opens_with_space: whether text that nothing comes before is encoded with a space in front
            that is not its own, which the encoder leaves to its caller.
        reopens_with_space: whether so is text behind a special token, unless it begins with one.
        splits: id to the ids that the encoder's stands for, of SentencePiece's unused pieces.
        special_tokens: id to the special (control) token of that id.
        is_byte_level: whether a token's text stands for bytes, one character each (GPT-2); else
            it is a SentencePiece piece, with U+2581 for a space and `<0x0A>` for a byte.
        strips_leading_space: whether decoding drops the one space that encoding put in front.
        prefix_ids: put in front of a prompt that asks for special tokens.
        suffix_ids: put behind it.
        bos_token_id: the id that begins a sequence, or None.
        eos_token_id: the one that chat templates write as `eos_token`, or None.
        eos_token_ids: ids that end a sequence, in the checkpoint's order; possibly none.
        chat_template: the source of the chat template, or None.
    """

    encoder: tokenizers.Tokenizer
    opens_with_space: bool = False
    reopens_with_space: bool = False
    splits: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    special_tokens: Mapping[int, tokenizers.AddedToken]
    is_byte_level: bool
    strips_leading_space: bool
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    chat_template: str | None


def added(
    text: str, *, is_special: bool, takes_space_behind: bool = False
) -> tokenizers.AddedToken:
    """Returns a token that is matched in the text as written, before any normalization."""
    return tokenizers.AddedToken(
        text, special=is_special, normalized=False, rstrip=takes_space_behind
    )


def check_text(text: str, field: str) -> None:
    """Raises RequestError naming `field` where the text has no UTF-8 form (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"got U+{ord(text[error.start]):04X} at character {error.start} of {field}; text must"
            " be valid Unicode, without lone surrogates; send it as UTF-8",
            field=field,
        ) from None


def unique(ids: Iterable[int | None]) -> tuple[int, ...]:
    """Returns the ids in order, each once, without those that are None."""
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
