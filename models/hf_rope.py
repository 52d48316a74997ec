"""The rope in a Hugging Face config.json, in either of its two forms.

Until transformers 5, `rope_theta` and `rope_scaling` stand on their own; from 5 on,
`rope_parameters` holds both, and in Gemma 3 one object for each kind of layer. Where a file has
both forms they must agree.
"""

import math
from dataclasses import dataclass

from pallasite.models.checkpoint_fields import Fields, shown
from pallasite.models.config import LinearRope, Llama3Rope, LongRope, RopeScaling
from pallasite.models.errors import CheckpointError

_COMMON_SETTINGS = {"rope_type", "type", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
_SETTINGS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor", _ORIGINAL},
}
# What the first files of Phi-3 call it.
_ALIASES = {"su": "longrope"}


@dataclass(frozen=True, kw_only=True)
class RopeRules:
    """What an architecture's rope may be.

    Attributes:
        types: the values of rope_type that are supported.
        theta: the base where the file has none.
        local_theta: the same for layers with a window, None where they turn as all others do.
        is_partial: whether a part of each head may be left unturned.
    """

    types: tuple[str, ...] = ("default", "linear", "llama3")
    theta: float = 10000.0
    local_theta: float | None = None
    is_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Rope:
    """What was read; `part` is how much of each head is turned, the rest as in ModelConfig."""

    theta: float
    scaling: RopeScaling | None
    local_theta: float | None
    part: float


def read_rope(fields: Fields, rules: RopeRules, context_len: int) -> Rope:
    """Reads the rope of a model that is made for context_len tokens. Raises CheckpointError."""
    new = fields.fields("rope_parameters")
    local_theta = None
    if rules.local_theta is not None:
        both, new = new, new.fields("full_attention")
        local = both.fields("sliding_attention")
        for name in both.values:
            if name not in ("full_attention", "sliding_attention"):
                raise both.error(name, "only full_attention and sliding_attention are supported")
        _read_scaling(_without_theta(local), fields, ("default",), context_len)
        _read_part(False, local)
        local_theta = _read_theta(fields, "rope_local_base_freq", local, rules.local_theta)
    old = fields.fields("rope_scaling")
    theta = _read_theta(fields, "rope_theta", new, rules.theta)
    scaling = _read_scaling(_without_theta(new), fields, rules.types, context_len)
    if fields.has("rope_scaling"):
        old_scaling = _read_scaling(old, fields, rules.types, context_len)
        if fields.has("rope_parameters") and old_scaling != scaling:
            raise fields.error("rope_parameters", "it must agree with rope_scaling beside it")
        scaling = old_scaling
    part = _read_part(rules.is_partial, fields, new, old)
    return Rope(theta=theta, scaling=scaling, local_theta=local_theta, part=part)


def _read_theta(fields: Fields, name: str, new: Fields, default: float) -> float:
    theta = fields.number(name, new.number("rope_theta", default))
    if new.number("rope_theta", theta) != theta:
        raise fields.error(name, "it must agree with rope_parameters beside it")
    return theta


def _without_theta(rope: Fields) -> Fields:
    return Fields({k: v for k, v in rope.values.items() if k != "rope_theta"}, rope.source)


def _read_part(is_partial: bool, *places: Fields) -> float:
    name = "partial_rotary_factor"
    stated = [place for place in places if place.has(name)]
    if not stated:
        return 1.0
    part = stated[0].number(name)
    for place in stated:
        if not is_partial and place.number(name) != 1.0:
            raise place.error(name, "only 1.0 is supported")
        if place.number(name) > 1.0:
            raise place.error(name, "it must be at most 1.0")
        if place.number(name) != part:
            raise place.error(name, f"in {stated[0].source} it is {part}, and they must agree")
    return part


def _read_scaling(
    rope: Fields, fields: Fields, types: tuple[str, ...], context_len: int
) -> RopeScaling | None:
    """Reads how a rope is stretched; `fields` are all settings, of which LongRoPE has some."""
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = _ALIASES.get(kind, kind)
    if kind not in types:
        raise CheckpointError(
            f"got rope type {shown(kind)} in {rope.source}; supported are {', '.join(types)};"
            " choose another checkpoint"
        )
    settings = _COMMON_SETTINGS | _SETTINGS[kind]
    for name in rope.values:
        if name not in settings and rope.has(name):
            raise CheckpointError(
                f"got {shown(name)} in {rope.source}; a {kind} rope has"
                f" {', '.join(sorted(settings))}; choose another checkpoint"
            )
    match kind:
        case "linear":
            return LinearRope(factor=rope.number("factor"))
        case "llama3":
            return _read_llama3(rope)
        case "longrope":
            return _read_long_rope(rope, fields, context_len)
    return None


def _read_llama3(rope: Fields) -> Llama3Rope:
    scaling = Llama3Rope(
        factor=rope.number("factor"),
        low_frequency_factor=rope.number("low_freq_factor"),
        high_frequency_factor=rope.number("high_freq_factor"),
        original_context_len=rope.integer(_ORIGINAL),
    )
    if scaling.high_frequency_factor <= scaling.low_frequency_factor:
        raise rope.error("high_freq_factor", "it must be above low_freq_factor")
    return scaling


def _read_long_rope(rope: Fields, fields: Fields, context_len: int) -> LongRope:
    """Where no attention factor is stated, it is the one that LongRoPE's authors derive."""
    original = fields.integer(_ORIGINAL, lowest=2)
    if rope.integer(_ORIGINAL, original) != original:
        raise rope.error(_ORIGINAL, f"in {fields.source} it is {original}, and they must agree")
    factor = max(rope.number("factor", context_len / original), 1.0)
    derived = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
        original_context_len=original,
        attention_factor=rope.number("attention_factor", derived),
    )
