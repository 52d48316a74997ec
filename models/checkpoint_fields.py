"""Typed reading of the settings that come with weights: config.json, or a GGUF's metadata.

A file of weights is data from elsewhere. Each value is checked for its type and range here, so
that no later line meets a string where it wants a number. What the settings mean is not known here.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pallasite.models.errors import CheckpointError, ConfigError

MAX_SIZE = 2**31 - 1


def parse_json(data: bytes, source: str) -> dict[str, object]:
    """Returns the object that `data` holds. Duplicate keys, at any depth, are CheckpointError."""
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"got {source} that is not valid JSON ({reason[:200]}); it must be a JSON object with"
            " unique keys; fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"got {source} that holds a {type(value).__name__}; it must be a JSON object; fetch it"
            " again"
        )
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return values


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: escaped, and at most about 80 characters.

    Containers are named, not printed: their text has no bound.
    """
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, bool | float | None):
        return repr(value)
    if isinstance(value, int):
        # Printing a huge int is quadratic in its length, and refused past a few thousand digits.
        return (
            str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
        )
    return f"a {type(value).__name__}"


@dataclass(frozen=True)
class Fields:
    """Settings by name, and what the messages call their source. A null counts as absent.

    Each reader takes the value to use where the setting is absent; without one it is required.
    Every one raises CheckpointError naming the setting.
    """

    values: Mapping[str, object]
    source: str

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int | None = None, lowest: int = 1) -> int:
        """Reads an integer from `lowest` to MAX_SIZE."""
        value = self._value(name, default)
        if type(value) is not int or not lowest <= value <= MAX_SIZE:
            raise self.error(name, f"it must be an integer from {lowest} to {MAX_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Reads a finite number above 0."""
        value = _as_number(self._value(name, default))
        if value is None:
            raise self.error(name, "it must be a finite number above 0")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        """Reads a list of finite numbers above 0."""
        values = self.items(name)
        numbers = [number for value in values if (number := _as_number(value)) is not None]
        if len(numbers) != len(values):
            raise self.error(name, "each of its items must be a finite number above 0")
        return tuple(numbers)

    def items(self, name: str) -> list[object]:
        """Reads a list."""
        value = self._value(name, None)
        if not isinstance(value, list):
            raise self.error(name, "it must be a list")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, "it must be a string")
        return value

    def fields(self, name: str) -> "Fields":
        """Reads a nested object; an absent one is empty."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            raise self.error(name, "it must be an object")
        return Fields(value, f"{name} of {self.source}")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """Reads one token id or a list of them, each in [0, vocab_size); absent is empty."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise CheckpointError(
                    f"got {name}={shown(token_id)} in {self.source}; a token id must be an integer"
                    f" from 0 to {vocab_size - 1}; mend the checkpoint"
                )
        return tuple(dict.fromkeys(ids))

    def error(self, name: str, allowed: str) -> CheckpointError:
        """What to raise for a setting whose value cannot be used."""
        if not self.has(name):
            return CheckpointError(
                f"got no {shown(name)} in {self.source}; {allowed}; fetch or convert the"
                " checkpoint again"
            )
        return CheckpointError(
            f"got {name}={shown(self.values[name])} in {self.source}; {allowed}; choose another"
            " checkpoint or mend this one"
        )

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(name)
        return default if value is None else value


def _as_number(value: object) -> float | None:
    """Returns a finite number above 0 as a float, and None for anything else."""
    if type(value) is int and 0 < value <= MAX_SIZE:
        return float(value)
    return value if type(value) is float and math.isfinite(value) and value > 0 else None


@contextmanager
def as_checkpoint_errors() -> Iterator[None]:
    """Turns ConfigError into CheckpointError where a ModelConfig is made of a checkpoint."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def check_layers(num_layers: int, names: Iterable[str]) -> None:
    """Raises CheckpointError unless the tensors are of layers 0 to L-1, whatever is in each.

    To be called before anything is made for each layer: num_layers may be absurd.
    """
    layers = (re.match(r"model\.layers\.(\d{1,9})\.", name) for name in names)
    found = {int(layer[1]) for layer in layers if layer}
    if len(found) != num_layers or max(found) != num_layers - 1:
        span = f"{len(found)}, numbered {min(found)} to {max(found)}" if found else "none"
        raise CheckpointError(
            f"got settings of {num_layers} layers and tensors of {span}; they must agree;"
            " fetch or convert the checkpoint again"
        )
