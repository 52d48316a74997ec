"""SentencePiece's own file, tokenizer.model: one protocol buffer, `sentencepiece.ModelProto`.

The message is described here as far as it is read, by the field numbers of SentencePiece's
sentencepiece_model.proto; other fields are passed over. Nothing in the file is trusted: its size
bounds what parsing may take.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import DecodeError

from pallasite.engine.errors import ConfigError
from pallasite.server.sentencepiece import Pieces, PieceType
from pallasite.server.tokenizer_parts import SPACE

# Gemma's, the largest known, has 262,144 pieces in 5 MB.
MAX_FILE_BYTES = 8 << 20
MAX_PIECES = 1 << 20
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a tokenizer.model holds.

    Attributes:
        pieces: the vocabulary.
        adds_space: whether a text is encoded with a space in front.
        bos_id, eos_id: the pieces that begin and end a sequence, or None.
    """

    pieces: Pieces
    adds_space: bool
    bos_id: int | None
    eos_id: int | None


def read_model(path: Path) -> SentencePieceModel:
    """Reads a tokenizer.model. Raises ConfigError for one that is damaged, and for what such a file
    can ask for and is not done here: each kind but BPE, and every change of the text itself."""
    if (num_bytes := path.stat().st_size) > MAX_FILE_BYTES:
        raise _unusable(f"{num_bytes} bytes", f"at most {MAX_FILE_BYTES}")
    message = _model_proto()()
    try:
        message.ParseFromString(path.read_bytes())
        num_pieces = len(message.pieces)
        if not 0 < num_pieces <= MAX_PIECES:
            raise _unusable(f"{num_pieces} pieces", f"1 to {MAX_PIECES}")
        texts = [piece.piece.decode() for piece in message.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise _unusable("bytes that are no such message", "what SentencePiece wrote") from error
    _check_support(message)
    if not all(texts):
        raise _unusable("an empty piece", "pieces of at least one character")
    types = [piece.type for piece in message.pieces]
    trainer = message.trainer_spec
    model = SentencePieceModel(
        pieces=Pieces(
            texts=texts,
            types=types,
            scores=[piece.score for piece in message.pieces],
            unknown_id=_piece_id(trainer.unk_id, num_pieces),
        ),
        adds_space=message.normalizer_spec.add_dummy_prefix,
        bos_id=_piece_id(trainer.bos_id, num_pieces),
        eos_id=_piece_id(trainer.eos_id, num_pieces),
    )
    if model.adds_space and any(
        text.startswith(SPACE) and piece_type == PieceType.USER_DEFINED
        for text, piece_type in zip(texts, types, strict=True)
    ):
        # The space in front would be part of it; it is found in the text as written.
        raise _unusable("user-defined pieces that begin with a space", "none beside a space prefix")
    return model


def _check_support(message: Any) -> None:
    trainer, normalizer = message.trainer_spec, message.normalizer_spec
    if (kind := trainer.model_type) != 2:
        raise _unusable(f"a model of type {_MODEL_TYPES.get(kind, kind)!r}", "one of type 'bpe'")
    if trainer.treat_whitespace_as_suffix:
        raise _unusable("treat_whitespace_as_suffix", "spaces in front of words")
    if normalizer.precompiled_charsmap or message.denormalizer_spec.precompiled_charsmap:
        name = normalizer.name.decode(errors="replace")
        raise _unusable(f"a normalizer that changes characters ({name[:40]!r})", "'identity'")
    if normalizer.remove_extra_whitespaces:
        raise _unusable("remove_extra_whitespaces", "spaces kept as they are")
    if not normalizer.escape_whitespaces:
        raise _unusable("spaces that are not escaped", "U+2581 for a space")


def _piece_id(token_id: int, num_pieces: int) -> int | None:
    if token_id >= num_pieces:
        raise _unusable(f"{num_pieces} pieces and a piece {token_id}", "the pieces that it names")
    return token_id if token_id >= 0 else None


def _unusable(got: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"got a tokenizer.model with {got}; it must have {allowed}; use a folder with"
        " tokenizer.json, or a GGUF file"
    )


_KINDS = {
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "float": FieldDescriptorProto.TYPE_FLOAT,
}
# Message to field to its number, its kind and its default. Enumerations are read as numbers, and
# strings as bytes: the runtime gives strings that are not UTF-8 as bytes.
_MESSAGES: dict[str, dict[str, tuple[int, str, str]]] = {
    "Piece": {"piece": (1, "bytes", ""), "score": (2, "float", "0"), "type": (3, "int32", "1")},
    "TrainerSpec": {
        "model_type": (3, "int32", "1"),
        "treat_whitespace_as_suffix": (24, "bool", "false"),
        "unk_id": (40, "int32", "0"),
        "bos_id": (41, "int32", "1"),
        "eos_id": (42, "int32", "2"),
    },
    "NormalizerSpec": {
        "name": (1, "bytes", ""),
        "precompiled_charsmap": (2, "bytes", ""),
        "add_dummy_prefix": (3, "bool", "true"),
        "remove_extra_whitespaces": (4, "bool", "true"),
        "escape_whitespaces": (5, "bool", "true"),
    },
    "ModelProto": {
        "pieces": (1, "Piece", ""),
        "trainer_spec": (2, "TrainerSpec", ""),
        "normalizer_spec": (3, "NormalizerSpec", ""),
        "denormalizer_spec": (5, "NormalizerSpec", ""),
    },
}


@cache
def _model_proto() -> Any:
    """Returns the message's class."""
    file = descriptor_pb2.FileDescriptorProto(name="tokenizer_model.proto", package="tokenizer")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind, default) in fields.items():
            field = message.field.add(
                name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL
            )
            if kind in _KINDS:
                field.type, field.default_value = _KINDS[kind], default
            else:
                field.type = FieldDescriptorProto.TYPE_MESSAGE
                field.type_name = f".tokenizer.{kind}"
            if name == "pieces":
                field.label = FieldDescriptorProto.LABEL_REPEATED
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tokenizer.ModelProto"))
