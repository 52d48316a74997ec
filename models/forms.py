"""In what form a weight is held: as floats or quantized, chosen by rules over weights' names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pallasite.models.errors import ConfigError

BaseForm = Literal["f32", "bf16"]
"""The form of weights that no rule names, and what the inputs of products are rounded to."""

DEFAULT_INT4_GROUP = 32

EVERY_LAYER = r"^model\.layers\."
"""A pattern of the names of all matrices but the embedding and the output head."""

Kind = Literal["f32", "bf16", "fp8", "int8", "int4"]

Rule = tuple[str, str]
"""A regular expression that is searched for in a weight's name, and the form of what it finds."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a matrix `[out, in]` is held.

    Attributes:
        kind: "f32" and "bf16" are floats, "fp8" is float8_e4m3fn; the rest are integers with
            scales.
        group: how many of a row's neighbours share one scale; None for the whole row.
        quantizes_inputs: whether what it is multiplied with is rounded to int8 too, with a scale a
            token, or one a token and group. The CPU's bodies leave the largest of 32 as it is.
        has_half_scales: whether scales, and minimums, are numbers of float16, as a GGUF's are.
    """

    kind: Kind
    group: int | None = None
    quantizes_inputs: bool = False
    has_half_scales: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.kind not in ("f32", "bf16")

    def __str__(self) -> str:
        if self.has_half_scales:
            return {form: name for name, form in GGUF_FORMS.items()}[self]
        name = f"w{self.kind[-1]}a8" if self.quantizes_inputs else self.kind
        return name if self.group is None else f"{name}:{self.group}"


GGUF_FORMS = {
    "q4_1": Form(kind="int4", group=32, quantizes_inputs=True, has_half_scales=True),
    "q8_0": Form(kind="int8", group=32, quantizes_inputs=True, has_half_scales=True),
}
"""GGUF's own, by its names."""


def parse_form(text: str) -> Form:
    """Reads a form: "f32", "bf16", "fp8", "int8", "w8a8", "int4", "w4a8", "q4_1" or "q8_0".

    All from int8 to w4a8 may have a group, as in "int4:64"; those of 4 bits without one have groups
    of 32. Raises ConfigError.
    """
    if text in GGUF_FORMS:
        return GGUF_FORMS[text]
    name, colon, group = text.partition(":")
    takes_group = name in ("int8", "w8a8", "int4", "w4a8")
    is_known = takes_group or name in ("f32", "bf16", "fp8")
    has_group = re.fullmatch(r"[1-9][0-9]{0,4}", group) and int(group) % 2 == 0
    if not is_known or (colon and not (takes_group and has_group)):
        raise ConfigError(
            f"got the weight form {text[:40]!r}; allowed are f32, bf16, fp8, q4_1, q8_0, int8,"
            " w8a8, int4 and w4a8, the last four also with an even group, as in int4:64; choose one"
        )
    if name in ("int4", "w4a8"):
        size = int(group) if colon else DEFAULT_INT4_GROUP
        return Form(kind="int4", group=size, quantizes_inputs=name == "w4a8")
    width = int(group) if colon else None
    kinds: dict[str, Kind] = {"f32": "f32", "bf16": "bf16", "fp8": "fp8", "int8": "int8"}
    if name == "w8a8":
        return Form(kind="int8", group=width, quantizes_inputs=True)
    return Form(kind=kinds[name], group=width)


def check_rules(rules: Sequence[Rule]) -> None:
    """Raises ConfigError for a rule whose pattern or form cannot be read."""
    for pattern, form in rules:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"got the weight pattern {pattern[:80]!r}, which is no regular expression"
                f" ({error}); allowed is one as in Python's re; mend it"
            ) from None
        parse_form(form)


def pattern_name(tensor_name: str) -> str:
    """Returns the name that rules are matched against, for one layer's tensor as for all."""
    name = re.sub(r"^model\.layers\.\d+\.", "model.layers.*.", tensor_name)
    return name.removesuffix(".weight")


def form_of(name: str, rules: Iterable[Rule]) -> Form | None:
    """Returns the form that the first rule to match gives a weight, None where none does.

    `name` is a `pattern_name`: the weight's Hugging Face name without ".weight" and with "*" for
    the layer's number, as in "model.layers.*.self_attn.q_proj".
    """
    for pattern, form in rules:
        if re.search(pattern, name):
            return parse_form(form)
    return None
