"""Text to token ids and back.

Special tokens are found by this file alone, in text that its caller vouches for (a rendered chat
template): the encoder itself never makes one, so that no user's text can.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from pallasite.engine.errors import ConfigError, RequestError
from pallasite.models.checkpoint_write import TOKENIZER_GGUF
from pallasite.models.gguf_file import GgufFile
from pallasite.server.tokenizer_gguf import build_from_gguf
from pallasite.server.tokenizer_hf import build_from_folder
from pallasite.server.tokenizer_parts import SPACE, TokenizerParts, added, check_text

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def load_tokenizer(path: Path) -> "Tokenizer":
    """Loads the tokenizer of a Hugging Face folder or a GGUF file.

    A folder that `pallasite quantize` made of a GGUF file has its tokenizer in TOKENIZER_GGUF.
    Raises ConfigError (the command line exits with 2) where it is missing, damaged or of a kind
    that is not known.
    """
    if path.is_dir() and not (path / TOKENIZER_GGUF).is_file():
        return Tokenizer(build_from_folder(path))
    path = path / TOKENIZER_GGUF if path.is_dir() else path
    return Tokenizer(build_from_gguf(GgufFile(path).metadata))


class Tokenizer:
    """Encodes prompts, decodes completions. Safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest id. A model's embedding may have more rows.
        prefix_ids: put in front of a prompt that asks for special tokens.
        bos_token_id: the id that begins a sequence, or None.
        eos_token_id: the one that chat templates write as `eos_token`, or None.
        eos_token_ids: ids that end a sequence, as the checkpoint's generation settings say.
        adds_bos: whether encoding with special tokens puts BOS in front.
        special_ids: ids of control tokens, which stand for no text of a user.
        chat_template: the source of the checkpoint's chat template, or None.
        strips_leading_space: whether decoding drops one space at the start of the text.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._encoder = parts.encoder
        self._encoder.encode_special_tokens = True
        _refuse_unknown(self._encoder)
        # For the rest of a text that was cut, and for text behind a special token.
        self._inner_encoder = _without_prefix(parts.encoder)
        is_first_only = "first" in _prefix_schemes(parts.encoder)
        self._continuing_encoder = self._inner_encoder if is_first_only else parts.encoder
        special_tokens = [token for token in parts.special_tokens.values() if token.content]
        self._found_ids = [i for i, token in parts.special_tokens.items() if token.content]
        self._splitter = _make_finder(special_tokens)
        self._finder = _make_finder([added(t.content, is_special=True) for t in special_tokens])
        self._added = parts.encoder.get_added_tokens_decoder()
        ids = self._encoder.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(ids.values())
        self._texts: list[str | None] = [None] * self.vocab_size
        for text, token_id in ids.items():
            self._texts[token_id] = text
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        # A byte-level encoder drops, without a word, a byte that its vocabulary lacks.
        self._present_bytes = bytes(
            byte for char, byte in _BYTES_BY_CHAR.items() if not parts.is_byte_level or char in ids
        )
        self.prefix_ids = parts.prefix_ids
        self.bos_token_id = parts.bos_token_id
        self.eos_token_id = parts.eos_token_id
        self.eos_token_ids = parts.eos_token_ids
        self.adds_bos = self.bos_token_id is not None and self.bos_token_id in parts.prefix_ids
        self.special_ids = frozenset(parts.special_tokens)
        self.chat_template = parts.chat_template
        self.strips_leading_space = parts.strips_leading_space

    def encode(self, text: str, *, adds_special_tokens: bool, field: str = "prompt") -> list[int]:
        """Encodes a user's text. A special token's string in it is plain text, never that token.

        `adds_special_tokens` puts around it what the checkpoint puts around a prompt (BOS).
        Raises RequestError naming `field` for text that has no UTF-8 form, or has a character
        that the vocabulary cannot spell.
        """
        ids = self._encode_first(text, field)
        if not adds_special_tokens:
            return ids
        return [*self.prefix_ids, *ids, *self._parts.suffix_ids]

    def encode_inside(self, text: str, *, field: str) -> list[int]:
        """Encodes text as it stands within another, with no space in front but its own.

        Raises RequestError as `encode` does.
        """
        self._check(text, field)
        return self._encode_plain(text, self._inner_encoder, field)

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Encodes what `split_special` returned: ids stay, text is plain text.

        Nothing is put around the whole. Raises RequestError naming `messages` as `encode` does.
        """
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            if i == 0:
                ids += self._encode_first(piece, "messages")
            else:
                self._check(piece, "messages")
                if self._parts.reopens_with_space and not piece.startswith(" "):
                    piece = " " + piece
                ids += self._encode_plain(piece, self._continuing_encoder, "messages")
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cuts trusted text at its special tokens: strings between them, ids for them.

        The leftmost, then the longest, wins. Space that a token claims beside it goes with it.
        """
        pieces: list[str | int] = []
        end = 0
        for start, stop, token_id in self._find(self._splitter, text):
            pieces += [text[end:start]] if start > end else []
            pieces.append(token_id)
            end = stop
        return pieces + ([text[end:]] if end < len(text) else [])

    def find_special(self, text: str) -> list[int]:
        """Returns where the strings of special tokens begin in the text, in characters.

        Of strings that overlap, the leftmost, then the longest, counts.
        """
        return [start for start, _, _ in self._find(self._finder, text)]

    def _find(self, finder: tokenizers.Tokenizer, text: str) -> list[tuple[int, int, int]]:
        found = finder.encode(text, add_special_tokens=False)
        return [
            (start, end, self._found_ids[i])
            for i, (start, end) in zip(found.ids, found.offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skips_special: bool) -> str:
        """Decodes ids, without the special ones if so asked.

        Bytes that are not UTF-8 become U+FFFD, one for each longest beginning of a character
        (Unicode, chapter 3, "U+FFFD Substitution of Maximal Subparts"). Raises ValueError for an
        id outside the vocabulary.
        """
        special_ids = self.special_ids if skips_special else frozenset()
        kept = (self.token_bytes(token_id) for token_id in ids if token_id not in special_ids)
        text = b"".join(kept).decode(errors="replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token adds to a text; a special one adds its own text.

        Raises ValueError for an id outside the vocabulary.
        """
        text = self.token_text(token_id)
        value = self._bytes[token_id]
        if value is None:
            value = self._bytes[token_id] = self._make_bytes(token_id, text)
        return value

    def token_text(self, token_id: int) -> str:
        """Returns a token as the vocabulary spells it. Raises ValueError for an id outside it."""
        text = self._texts[token_id] if 0 <= token_id < self.vocab_size else None
        if text is None:
            raise ValueError(
                f"got token id {token_id}; ids are those of the tokenizer, below"
                f" {self.vocab_size}; send another"
            )
        return text

    def _make_bytes(self, token_id: int, text: str) -> bytes:
        if token_id in self.special_ids:
            return text.encode()
        if self._parts.is_byte_level:
            if token_id not in self._added and all(char in _BYTES_BY_CHAR for char in text):
                return bytes(_BYTES_BY_CHAR[char] for char in text)
            return text.encode()
        if match := _BYTE_PIECE.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace(SPACE, " ").encode()

    def _encode_first(self, text: str, field: str) -> list[int]:
        """Encodes text that nothing comes before."""
        self._check(text, field)
        if self._parts.opens_with_space and text:
            text = " " + text
        return self._encode_plain(text, self._encoder, field)

    def _encode_plain(self, text: str, encoder: tokenizers.Tokenizer, field: str) -> list[int]:
        ids = self._encode_textual(text, encoder, field)
        splits = self._parts.splits
        if splits.keys().isdisjoint(ids):
            return ids
        return [part for token_id in ids for part in splits.get(token_id, (token_id,))]

    def _encode_textual(self, text: str, encoder: tokenizers.Tokenizer, field: str) -> list[int]:
        """Encodes text to ids that are not special."""
        try:
            encoding = encoder.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises no narrower class
            raise _unspeakable(_find_unknown(text, encoder), field) from error
        ids = encoding.ids
        if self.special_ids.isdisjoint(ids):
            return ids
        # A vocabulary may hold a special token's string as an ordinary piece too (unigram models,
        # or BPE that takes whole words as they are). Cut inside it, so that it cannot be whole.
        cuts = []
        for token_id, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token_id in self.special_ids and text[start:end] == self._texts[token_id]:
                if end - start == 1:
                    raise _unspeakable(text[start], field)
                cuts.append(start + 1)
        if not cuts:
            return ids
        ids = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            part_encoder = encoder if start == 0 else self._inner_encoder
            ids += self._encode_textual(text[start:end], part_encoder, field)
        return ids

    def _check(self, text: str, field: str) -> None:
        check_text(text, field)
        if len(self._present_bytes) < 256 and text.encode().translate(None, self._present_bytes):
            raise _unspeakable(
                next(c for c in text if c.encode().translate(None, self._present_bytes)), field
            )


def _unspeakable(char: str, field: str) -> RequestError:
    return RequestError(
        f"got U+{ord(char):04X} in {field}; this model's vocabulary has no text token for it;"
        " remove it",
        field=field,
    )


def _refuse_unknown(encoder: tokenizers.Tokenizer) -> None:
    """Has the encoder raise for a character that its vocabulary lacks, where it would drop it.

    BPE without an unknown token drops it without a word; one that is no token makes it an error.
    """
    if isinstance(encoder.model, models.BPE) and encoder.model.unk_token is None:
        name = "<unknown>"
        while encoder.token_to_id(name) is not None:
            name += ">"
        encoder.model.unk_token = name


def _find_unknown(text: str, encoder: tokenizers.Tokenizer) -> str:
    """Returns a character that the encoder raises for in the text."""

    def is_refused(part: str) -> bool:
        try:
            encoder.encode(part, add_special_tokens=False)
        except Exception:  # noqa: BLE001 - the library raises no narrower class
            return True
        return False

    alone = next(filter(is_refused, dict.fromkeys(text)), None)
    # Where it is one only with those before it, the shortest beginning that is refused has it last.
    ends = range(1, len(text))
    return alone or text[bisect_left(ends, True, key=lambda end: is_refused(text[:end]))]


def _make_finder(special_tokens: list[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """Returns an encoder that knows these tokens, numbered from 0, and drops all other text."""
    finder = tokenizers.Tokenizer(models.BPE())
    finder.add_special_tokens(special_tokens)
    return finder


def _without_prefix(encoder: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns the encoder without what puts a space in front of a text; the vocabulary is shared.

    It is the encoder itself where that puts none there.
    """
    if _prefix_schemes(encoder) <= {"never"}:
        return encoder
    bare = tokenizers.Tokenizer(encoder.model)
    # A part is made from its state as the part of a tokenizer.json only.
    shell = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    for name in ("normalizer", "pre_tokenizer"):
        if (part := getattr(encoder, name)) is not None:
            state = json.dumps(shell | {name: _without_space(_state(part))})
            setattr(bare, name, getattr(tokenizers.Tokenizer.from_str(state), name))
    by_id = sorted(encoder.get_added_tokens_decoder().items())
    bare.add_tokens([token for _, token in by_id])
    if bare.get_added_tokens_decoder().keys() != dict(by_id).keys():
        raise ConfigError(
            "got added tokens in tokenizer.json whose ids have gaps; they must follow the"
            " vocabulary's; use another tokenizer.json"
        )
    bare.encode_special_tokens = True
    return bare


def _prefix_schemes(encoder: tokenizers.Tokenizer) -> set[str]:
    """Returns where the encoder's parts put a space in front: "always", "first", "never"."""
    schemes = set()
    for part in (encoder.normalizer, encoder.pre_tokenizer):
        for step in () if part is None else _steps(_state(part)):
            schemes.add(step.get("prepend_scheme", "never"))
            if step["type"] == "Prepend" or step.get("add_prefix_space"):
                schemes.add("always")
    return schemes


def _state(part: normalizers.Normalizer | pre_tokenizers.PreTokenizer) -> dict[str, Any]:
    """Returns what the library's part is made of: it says so in its pickled form, which is JSON."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    parts = state.get("normalizers", state.get("pretokenizers"))
    if parts is None:
        yield state
    else:
        for part in parts:
            yield from _steps(part)


def _without_space(state: dict[str, Any]) -> dict[str, Any]:
    if state["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = dict(state)
    for name in ("normalizers", "pretokenizers"):
        if name in state:
            changed[name] = [_without_space(part) for part in state[name]]
    for name, value in (("prepend_scheme", "never"), ("add_prefix_space", False)):
        if name in state:
            changed[name] = value
    return changed


def _make_bytes_by_char() -> dict[str, int]:
    """Returns GPT-2's map of 256 printable characters to the bytes they stand for.

    A printable byte of Latin-1 stands for itself; the rest follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTES_BY_CHAR = _make_bytes_by_char()
