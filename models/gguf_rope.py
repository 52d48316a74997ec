"""How rope is stretched, in a GGUF file: in its metadata, or in tensors of factors.

Llama 3's scaling is not in the metadata. The file holds what it comes to, the number that each
rope frequency is divided by (`rope_freqs.weight`); `recover_rope_scaling` works back. LongRoPE's
factors are there as they are.
"""

import numpy as np

from pallasite.models.checkpoint_fields import Fields
from pallasite.models.config import LinearRope, Llama3Rope, LongRope, RopeScaling
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_architectures import LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS
from pallasite.models.gguf_file import GgufFile


def read_rope_scaling(
    file: GgufFile, fields: Fields, prefix: str, settings: frozenset[str], num_rotated: int
) -> RopeScaling | None:
    """Reads how rope is stretched where num_rotated dimensions of a head are turned.

    `settings` are the tensors that may say so, and `prefix` is what the metadata's keys begin with.
    Raises CheckpointError for what is contradictory or not supported.
    """
    kind = fields.text(f"{prefix}.rope.scaling.type", "none")
    supported = {"none", "linear"} | ({"longrope"} if LONG_FACTORS in settings else set())
    if kind not in supported:
        allowed = f"supported are {', '.join(sorted(supported))} and Llama 3's factors"
        raise fields.error(f"{prefix}.rope.scaling.type", allowed)
    stated = settings & set(file.tensors)
    for name in ("rope.scale_linear", "rope.scaling.factor"):
        is_used = kind == "linear" and name == "rope.scaling.factor"
        if not is_used and fields.number(f"{prefix}.{name}", 1.0) != 1.0:
            raise fields.error(f"{prefix}.{name}", "only 1.0 is supported")
    is_long = bool(stated & {SHORT_FACTORS, LONG_FACTORS})
    if not is_long and fields.number(f"{prefix}.rope.scaling.attn_factor", 1.0) != 1.0:
        raise fields.error(f"{prefix}.rope.scaling.attn_factor", "only 1.0 is supported")
    for name in stated:
        if kind == "linear":
            raise fields.error(f"{prefix}.rope.scaling.type", f"the tensor {name!r} makes it other")
        if (shape := file.tensors[name].shape) != (num_rotated // 2,):
            raise CheckpointError(
                f"got tensor {name!r} of shape {shape}; half of what rope turns of a head is"
                f" ({num_rotated // 2},); convert the model again"
            )
    if LLAMA3_FACTORS in stated:
        rope_theta = fields.number(f"{prefix}.rope.freq_base", 10000.0)
        return recover_rope_scaling(file.read(LLAMA3_FACTORS), rope_theta)
    if is_long:
        return _read_long_rope(file, fields, prefix)
    if kind == "longrope":
        raise fields.error(f"{prefix}.rope.scaling.type", f"it needs the tensor {LONG_FACTORS!r}")
    if kind == "linear":
        return LinearRope(factor=fields.number(f"{prefix}.rope.scaling.factor"))
    return None


def _read_long_rope(file: GgufFile, fields: Fields, prefix: str) -> LongRope:
    factors = []
    for name in (SHORT_FACTORS, LONG_FACTORS):
        if name not in file.tensors:
            raise CheckpointError(
                f"got no tensor {name!r} beside the other length's factors; both must be there;"
                " convert the model again"
            )
        # The shortest decimals that round to them, as config.json has them.
        values = tuple(float(str(value)) for value in file.read(name).astype(np.float32))
        if min(values) <= 0:
            raise CheckpointError(
                f"got tensor {name!r} with the factor {min(values)}; each must be above 0; convert"
                " the model again"
            )
        factors.append(values)
    return LongRope(
        short_factors=factors[0],
        long_factors=factors[1],
        original_context_len=fields.integer(f"{prefix}.rope.scaling.original_context_length"),
        attention_factor=fields.number(f"{prefix}.rope.scaling.attn_factor"),
    )


def rope_divisors(scaling: Llama3Rope, head_width: int, rope_theta: float) -> np.ndarray:
    """Returns what Llama 3's scaling divides each rope frequency by, float64 [H/2].

    Source: "The Llama 3 Herd of Models" (2024), as Meta's released code defines it.
    """
    turns = scaling.original_context_len * _frequencies(head_width, rope_theta) / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / (kept + (1.0 - kept) / scaling.factor)


def _frequencies(head_width: int, rope_theta: float) -> np.ndarray:
    return rope_theta ** (-np.arange(0, head_width, 2) / head_width)


def recover_rope_scaling(divisors: np.ndarray, rope_theta: float) -> Llama3Rope | None:
    """Finds the scaling that has these divisors of the rope's frequencies, [H/2].

    The part of a frequency that is kept is linear in it between the kept and the stretched ones;
    two points give the line. The line fixes two of the three remaining settings, and the third
    (the low-frequency factor) only names a unit: 1, as Llama 3 has it. So the result may be worded
    differently from the original and yet divides the same frequencies by the same numbers, which is
    checked. Raises CheckpointError where no scaling of this form does.
    """
    refusal = CheckpointError(
        f"got tensor {LLAMA3_FACTORS!r} with values that Llama 3's scaling does not make;"
        " frequencies must be kept, blended and stretched by one factor; convert the model again"
    )
    if divisors.min() == divisors.max() == 1.0:
        return None
    if divisors.min() < 1.0:
        raise refusal
    factor = float(str(divisors.max()))  # the shortest decimal: 8.0, or 11.7836
    divisors = divisors.astype(np.float64)
    kept = (1.0 / divisors - 1.0 / factor) / (1.0 - 1.0 / factor)
    turns = _frequencies(2 * len(divisors), rope_theta) / (2 * np.pi)
    points = _line(turns, kept)
    if points is None:
        raise refusal
    slope, at_zero = points
    # kept = (length * turns - low) / (high - low), with low = 1.
    length = round(slope / -at_zero) if at_zero < 0 < slope else 0
    if length < 1:
        raise refusal
    span = length / slope
    # Round settings only where they are the settings: those of float32 divisors are off by less.
    for rounded, tolerance in ((_rounded, 2e-7), (float, 2e-5)):
        scaling = Llama3Rope(
            factor=factor,
            low_frequency_factor=rounded(-at_zero * span),
            high_frequency_factor=rounded((1.0 - at_zero) * span),
            original_context_len=length,
        )
        made = rope_divisors(scaling, 2 * len(divisors), rope_theta)
        if np.allclose(made, divisors, rtol=tolerance, atol=0.0):
            return scaling
    raise refusal


def _line(turns: np.ndarray, kept: np.ndarray) -> tuple[float, float] | None:
    """Returns slope and value at 0 of the kept part as a line in `turns`, or None without one."""
    is_blended = (kept > 1e-6) & (kept < 1 - 1e-6)
    if is_blended.sum() >= 2:
        slope, at_zero = np.polyfit(turns[is_blended], kept[is_blended], 1)
        return float(slope), float(at_zero)
    whole, none = turns[kept >= 1 - 1e-6], turns[kept <= 1e-6]
    if not whole.size or not none.size:
        return None
    # Any line that keeps those kept and stretches those stretched does.
    low, high = (none.max(), 0.0), (whole.min(), 1.0)
    if is_blended.any():
        middle = (turns[is_blended][0], kept[is_blended][0])
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ((low, middle), (middle, high))]
        return float(max(slopes)), float(middle[1] - max(slopes) * middle[0])
    slope = 1.0 / (high[0] - low[0])
    return float(slope), float(-slope * low[0])


def _rounded(value: float) -> float:
    """Drops the digits that float32 divisors cannot carry."""
    return float(f"{value:.5g}")
