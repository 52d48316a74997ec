"""From the bytes of a call to a checked message: nothing malformed, unknown or odd gets past.

Protobuf keeps the fields that it does not know without a word, and names no field whose text is not
UTF-8; both are found here.
"""

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from pallasite.engine.errors import RequestError

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Our own messages are four deep.
_MAX_DEPTH = 16


def parse(message_type: type[Message], data: bytes, max_bytes: int) -> Message:
    """Parses one message.

    Raises RequestError for one over max_bytes, one that is no message of this type, one with a text
    that is not UTF-8 and one with a field that its type does not have, named where it can be.
    """
    if len(data) > max_bytes:
        raise RequestError(
            f"got a message of {len(data)} bytes; allowed are {max_bytes}; send less at once",
            field="message",
        )
    try:
        message = message_type.FromString(data)
    except DecodeError as error:
        field = next(_odd_texts(message_type.DESCRIPTOR, memoryview(data), "", 0), "")
        if field:
            raise RequestError(
                f"got a text that is not UTF-8 in {field}; it must be UTF-8; encode it so",
                field=field,
            ) from error
        raise RequestError(
            f"got bytes that are no {message_type.DESCRIPTOR.full_name}; they must be one; check"
            " the client's .proto files",
            field="message",
        ) from error
    for path, number in _unknown_fields(message, ""):
        raise RequestError(
            f"got field {number} in {path or 'the message'}, which this server does not know; send"
            " only fields of its .proto files; leave the field out or update the server",
            field=f"{path}.{number}".lstrip("."),
        )
    return message


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, int]]:
    for unknown in UnknownFieldSet(message):
        yield path, unknown.field_number
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE or field.message_type.GetOptions().map_entry:
            continue
        children = value if field.is_repeated else (value,)
        for child in children:
            yield from _unknown_fields(child, f"{path}.{field.name}".lstrip("."))


def _odd_texts(descriptor: Descriptor, data: memoryview, path: str, depth: int) -> Iterator[str]:
    """The paths of the text fields that are not UTF-8, until the data stops being a message."""
    position = 0
    while position < len(data) and depth < _MAX_DEPTH:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == _LENGTH:
            length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
            field = descriptor.fields_by_number.get(number)
            if field is None:
                continue
            name = f"{path}.{field.name}".lstrip(".")
            if field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(value):
                yield name
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                yield from _odd_texts(field.message_type, value, name, depth + 1)
        elif wire == _VARINT:
            _, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        else:
            return


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A varint and the position after it; past the data's end where it is cut short."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return 0, len(data)


def _is_utf8(data: memoryview) -> bool:
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        return False
    return True
