"""Builds a tokenizer from a GGUF file's metadata: its vocabulary, merges, scores and token types.

The keys are those of the GGUF specification (`tokenizer.ggml.*`). Two kinds are known: "gpt2" is
byte-level BPE with the merges given; "llama" is SentencePiece's BPE, whose merges follow from the
scores. What a file says of its pre-tokenizer is a name; the expressions stand in the table here.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pallasite.engine.errors import ConfigError
from pallasite.server.tokenizer_parts import TokenizerParts, added, unique

_SPACE = "\u2581"


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


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
    vocab = {text: token_id for token_id, text in enumerate(texts)}
    if len(vocab) != len(texts):
        raise _damaged("tokens", f"{len(texts) - len(vocab)} repeated tokens", "none")

    if kind == "gpt2":
        encoder, adds_bos = _build_byte_level(metadata, vocab)
        adds_space = False
    else:
        adds_space = _read(metadata, "add_space_prefix", bool, True)
        encoder = _build_sentencepiece(metadata, vocab, types, adds_space)
        adds_bos = True

    bos = _read_id(metadata, "bos", len(texts))
    eos = _read_id(metadata, "eos", len(texts))
    # End of turn and end of message: the ids that end an answer besides the end of the text.
    ends = unique([eos, *(_read_id(metadata, name, len(texts)) for name in ("eot", "eom"))])
    special_tokens = {
        token_id: added(text, is_special=True)
        for token_id, text in enumerate(texts)
        if types[token_id] == TokenType.CONTROL or token_id == bos or token_id in ends
    }
    encoder.add_special_tokens(list(special_tokens.values()))
    encoder.add_tokens(
        [
            added(text, is_special=False)
            for token_id, text in enumerate(texts)
            if types[token_id] == TokenType.USER_DEFINED and token_id not in special_tokens
        ]
    )

    adds_bos = _read(metadata, "add_bos_token", bool, adds_bos)
    adds_eos = _read(metadata, "add_eos_token", bool, False)
    chat_template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        encoder=encoder,
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


def _build_byte_level(
    metadata: Mapping[str, object], vocab: dict[str, int]
) -> tuple[Tokenizer, bool]:
    """Returns the encoder, and whether its family begins a prompt with BOS unless told not to."""
    name = _read(metadata, "pre", str)
    if name not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"got tokenizer.ggml.pre={name!r}; known pre-tokenizers are"
            f" {', '.join(sorted(_PRE_TOKENIZERS))}; use a checkpoint with one of them"
        )
    merges = []
    for line in _read_list(metadata, "merges", str):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise _damaged("merges", repr(line), "two tokens that together are a token")
        merges.append((left, right))
    is_llama = name in _LLAMA_BPE
    encoder = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama))
    encoder.pre_tokenizer = _PRE_TOKENIZERS[name]()
    if name in _QWEN2:
        encoder.normalizer = normalizers.NFC()
    return encoder, is_llama


def _build_sentencepiece(
    metadata: Mapping[str, object], vocab: dict[str, int], types: Sequence[int], adds_space: bool
) -> Tokenizer:
    scores = _read_list(metadata, "scores", float)
    if len(scores) != len(vocab):
        raise _damaged("scores", f"{len(scores)} entries", f"one for each of {len(vocab)} tokens")
    num_bytes = sum(token_type == TokenType.BYTE for token_type in types)
    if num_bytes not in (0, 256):
        raise _damaged("token_type", f"{num_bytes} byte tokens", "256, or none")
    unknown_id = _read_id(metadata, "unknown", len(vocab))
    encoder = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocab, types, scores),
            unk_token=None if unknown_id is None else list(vocab)[unknown_id],
            fuse_unk=True,
            byte_fallback=num_bytes == 256,
        )
    )
    space = normalizers.Replace(" ", _SPACE)
    encoder.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), space]) if adds_space else space
    )
    return encoder


def _merges_from_scores(
    vocab: dict[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Returns each way to put a piece together, best piece first.

    SentencePiece joins the neighbours whose union has the best score; as a list of merges that is
    every split of every piece into two pieces, ordered by the whole's score.
    """
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    pieces = {text: i for text, i in vocab.items() if types[i] in mergeable}
    merges = []
    for text, token_id in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[token_id], pieces[left], pieces[right], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*expressions: str) -> pre_tokenizers.PreTokenizer:
    """Returns what cuts at each expression in turn, then maps bytes to characters."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA_BPE = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": lambda: _split(_GPT2),
    "smollm": lambda: _split(r"\p{N}", _GPT2),
    **dict.fromkeys(_LLAMA_BPE, lambda: _split(_LLAMA3)),
    **dict.fromkeys(_QWEN2, lambda: _split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"))),
}

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
