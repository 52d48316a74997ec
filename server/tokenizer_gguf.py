"""Builds a tokenizer from a GGUF file's metadata: its vocabulary, merges, scores and token types.

The keys are those of the GGUF specification (`tokenizer.ggml.*`). Two kinds are known: "gpt2" is
byte-level BPE with the merges given; "llama" is SentencePiece's BPE, whose merges follow from the
scores. What a file leaves out is filled in as the checkpoint's own tokenizer has it, not as other
readers of GGUF do.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, models

from pallasite.engine.errors import ConfigError
from pallasite.models.gguf_ends import ends_by_text
from pallasite.server.pre_tokenizers import WORD_RULES
from pallasite.server.sentencepiece import Pieces, PieceType, build_encoder, splits_of_unused
from pallasite.server.tokenizer_parts import TokenizerParts, added, unique

# Phi 3's other tokens take the space behind them, which the format has no field for.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def build_from_gguf(metadata: Mapping[str, object]) -> TokenizerParts:
    """Builds the tokenizer that a GGUF file describes.

    Raises ConfigError naming the key for an unknown kind or pre-tokenizer, and for a vocabulary
    that is missing, damaged or contradicts itself.
    """
    kind = _read(metadata, "model", str)
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"got tokenizer.ggml.model={kind!r}; known kinds are 'gpt2' (byte-level BPE) and"
            " 'llama' (SentencePiece); use a checkpoint with one of them"
        )
    texts = _read_list(metadata, "tokens", str)
    types = _read_list(metadata, "token_type", int)
    if len(types) != len(texts):
        raise _damaged(
            "token_type", f"{len(types)} entries", f"one for each of {len(texts)} tokens"
        )
    if (num_repeated := len(texts) - len(set(texts))) != 0:
        raise _damaged("tokens", f"{num_repeated} repeated tokens", "none")

    bos = _read_id(metadata, "bos", len(texts))
    eos = _read_id(metadata, "eos", len(texts))
    # End of turn and end of message: the ids that end an answer besides the end of the text.
    ends = unique(
        [
            eos,
            *(_read_id(metadata, name, len(texts)) for name in ("eot", "eom")),
            *ends_by_text(texts),
        ]
    )
    is_special = [
        types[token_id] == PieceType.CONTROL or token_id == bos or token_id in ends
        for token_id in range(len(texts))
    ]
    adds_space = False
    splits: dict[int, tuple[int, ...]] = {}
    if kind == "gpt2":
        encoder, adds_bos = _build_byte_level(metadata, texts)
        encoder.add_tokens(
            [
                added(text, is_special=False)
                for token_id, text in enumerate(texts)
                if types[token_id] == PieceType.USER_DEFINED
            ]
        )
    else:
        adds_space = _read(metadata, "add_space_prefix", bool, True)
        pieces = _read_pieces(metadata, texts, types)
        encoder = build_encoder(pieces, puts_space_in_front=False)
        splits = splits_of_unused(pieces)
        adds_bos = True

    is_phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    special_tokens = {
        token_id: added(
            text, is_special=True, takes_space_behind=is_phi3 and text not in _PHI3_PLAIN
        )
        for token_id, text in enumerate(texts)
        if is_special[token_id]
    }
    encoder.add_special_tokens(list(special_tokens.values()))

    if bos is None and metadata.get("tokenizer.ggml.add_bos_token"):
        raise _damaged("bos_token_id", "nothing", "set where add_bos_token is")
    adds_bos = _read(metadata, "add_bos_token", bool, adds_bos)
    adds_eos = _read(metadata, "add_eos_token", bool, False)
    chat_template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        encoder=encoder,
        # Every text was encoded for itself when the models learned; templates put those texts into
        # one, some with the space that this had put in front and some without.
        opens_with_space=adds_space,
        reopens_with_space=adds_space,
        splits=splits,
        special_tokens=special_tokens,
        is_byte_level=kind == "gpt2",
        strips_leading_space=adds_space,
        prefix_ids=unique([bos]) if adds_bos else (),
        suffix_ids=unique([eos]) if adds_eos else (),
        bos_token_id=bos,
        eos_token_id=eos,
        eos_token_ids=ends,
        chat_template=chat_template if isinstance(chat_template, str) else None,
    )


def _build_byte_level(metadata: Mapping[str, object], texts: list[str]) -> tuple[Tokenizer, bool]:
    """Returns the encoder, and whether its family begins a prompt with BOS unless told not to."""
    name = _read(metadata, "pre", str)
    if name not in WORD_RULES:
        raise ConfigError(
            f"got tokenizer.ggml.pre={name!r}; known pre-tokenizers are"
            f" {', '.join(sorted(WORD_RULES))}; use a checkpoint with one of them"
        )
    rules = WORD_RULES[name]
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    merges = []
    for line in _read_list(metadata, "merges", str):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise _damaged("merges", repr(line), "two tokens that together are a token")
        merges.append((left, right))
    encoder = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=rules.takes_whole_words)
    )
    encoder.pre_tokenizer = rules.pre_tokenizer()
    if (normalizer := rules.normalizer()) is not None:
        encoder.normalizer = normalizer
    return encoder, rules.adds_bos


def _read_pieces(metadata: Mapping[str, object], texts: list[str], types: list[int]) -> Pieces:
    if _read(metadata, "remove_extra_whitespaces", bool, False):
        raise _damaged("remove_extra_whitespaces", "true", "false: no known model has it")
    scores = _read_list(metadata, "scores", float)
    if len(scores) != len(texts):
        raise _damaged("scores", f"{len(scores)} entries", f"one for each of {len(texts)} tokens")
    unknown_id = _read_id(metadata, "unknown", len(texts))
    if unknown_id is None and PieceType.UNKNOWN in types:
        unknown_id = types.index(PieceType.UNKNOWN)
    return Pieces(texts=texts, types=types, scores=scores, unknown_id=unknown_id)


_REQUIRED = object()


def _read(metadata: Mapping[str, object], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is _REQUIRED:
        raise _damaged(name, "nothing", "set")
    if value is not default and not _is_a(value, kind):
        raise _damaged(name, f"a {type(value).__name__}", f"a {kind.__name__}")
    return value


def _read_id(metadata: Mapping[str, object], name: str, vocab_size: int) -> int | None:
    token_id: int | None = _read(metadata, f"{name}_token_id", int, None)
    if token_id is not None and not 0 <= token_id < vocab_size:
        raise _damaged(f"{name}_token_id", str(token_id), f"an id below {vocab_size}")
    return token_id


def _read_list(metadata: Mapping[str, object], name: str, kind: type) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise _damaged(name, "nothing" if value is None else "no entries", "a list")
    for i, entry in enumerate(value):
        if not _is_a(entry, kind):
            raise _damaged(name, f"a {type(entry).__name__} at {i}", f"a list of {kind.__name__}")
    return value


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _damaged(name: str, got: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"got {got} for tokenizer.ggml.{name}; it must be {allowed}; convert or download the"
        " checkpoint again"
    )
