"""What a model is, in numbers. Frozen and static: every program is compiled for one of these."""

import math
from dataclasses import dataclass

from pallasite.models.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3's scaling of rope frequencies for long contexts.

    Wavelengths longer than original_context_len / low_frequency_factor are stretched by `factor`,
    those shorter than original_context_len / high_frequency_factor are kept, and those between
    are blended.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_len: int


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Every wavelength is stretched by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): each pair of a head's dimensions has a factor of its own.

    Attributes:
        short_factors, long_factors: what each wavelength is stretched by, one a pair; the long ones
            where a model serves more than original_context_len tokens.
        original_context_len: the context that the model was trained on first.
        attention_factor: sines and cosines are multiplied by it.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context_len: int
    attention_factor: float


RopeScaling = Llama3Rope | LinearRope | LongRope


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a decoder.

    Attributes:
        family: the registry's key ("llama").
        vocab_size: V, rows of the embedding.
        num_layers: L.
        model_width: D, the residual stream's width.
        ffn_width: F, the feed-forward width.
        num_query_heads: N.
        num_kv_heads: K; N is a multiple of it.
        head_width: H.
        context_len: the longest sequence that the model is served with.
        norm_epsilon: added to the mean square in each norm.
        rope_theta: the base of the rope frequencies.
        rope_scaling: how they are stretched, or None.
        rotary_width: how many of a head's dimensions, the first ones, rope turns; None for all.
        query_scale: what scores are multiplied by; None for H ** -0.5.
        windows: for each layer how many positions a query sees, itself included, None for all;
            empty where every layer sees all.
        local_rope_theta: the base, unscaled, in layers that have a window; None for rope_theta.
        ties_embedding: whether the output head is the embedding.
        eos_token_ids: ids that end a sequence, from the checkpoint's generation settings.
        bos_token_id: the id that begins a sequence, or None.
        stored_forms: rules (pattern, form) of the weights that the checkpoint holds quantized, as
            in `models/forms.py`; the first that matches a weight's name counts.
        block_forms: such rules for what a GGUF has in blocks that some targets multiply as they
            are. A checkpoint gives these weights as floats, unless it is asked for that form.
    """

    family: str
    vocab_size: int
    num_layers: int
    model_width: int
    ffn_width: int
    num_query_heads: int
    num_kv_heads: int
    head_width: int
    context_len: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_width: int | None = None
    query_scale: float | None = None
    windows: tuple[int | None, ...] = ()
    local_rope_theta: float | None = None
    ties_embedding: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    stored_forms: tuple[tuple[str, str], ...] = ()
    block_forms: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size num_layers model_width ffn_width num_query_heads num_kv_heads head_width"
            " context_len"
        )
        for name in sizes.split():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(
                    f"got {name}={value!r} in the model's config; it must be a positive integer;"
                    " mend the checkpoint's config"
                )
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"got {self.num_query_heads} query heads over {self.num_kv_heads} key heads; the"
                " first must be a multiple of the second; mend the checkpoint's config"
            )
        if self.head_width % 2:
            raise ConfigError(
                f"got head_width={self.head_width}; rope needs an even one; mend the"
                " checkpoint's config"
            )
        for name in ("norm_epsilon", "rope_theta", "query_scale", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"got {name}={value}; it must be finite and > 0; mend the checkpoint's config"
                )
        self._check_rope()
        if self.windows and len(self.windows) != self.num_layers:
            raise ConfigError(
                f"got windows of {len(self.windows)} layers; the model has {self.num_layers}; mend"
                " the checkpoint's config"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ConfigError(
                f"got a window of {min(w for w in self.windows if w is not None)}; a query sees"
                " itself at least; mend the checkpoint's config"
            )

    @property
    def num_rotated(self) -> int:
        """A head's dimensions that rope turns."""
        return self.head_width if self.rotary_width is None else self.rotary_width

    @property
    def attention_scale(self) -> float:
        """What the scores of queries and keys are multiplied by."""
        return self.head_width**-0.5 if self.query_scale is None else self.query_scale

    def _check_rope(self) -> None:
        width = self.num_rotated
        if not 0 < width <= self.head_width or width % 2:
            raise ConfigError(
                f"got rotary_width={width}; it must be even, and from 2 to the head's"
                f" {self.head_width}; mend the checkpoint's config"
            )
        scaling = self.rope_scaling
        if isinstance(scaling, LongRope):
            for factors in (scaling.short_factors, scaling.long_factors):
                if len(factors) != width // 2:
                    raise ConfigError(
                        f"got {len(factors)} rope factors; a head has {width // 2} pairs; mend the"
                        " checkpoint's config"
                    )
