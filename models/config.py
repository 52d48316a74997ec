"""What a model is, in numbers. Frozen and static: every program is compiled for one of these."""

from dataclasses import dataclass
from typing import Literal

from pallasite.models.errors import ConfigError

WeightForm = Literal["f32", "bf16"]
"""How the weights of matrix products are held. Quantized forms join here and in `layers.linear`."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
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
        context_len: the longest sequence that the model was made for.
        norm_epsilon: added to the mean square in each norm.
        rope_theta: the base of the rope frequencies.
        rope_scaling: how they are stretched, or None.
        ties_embedding: whether the output head is the embedding.
        eos_token_ids: ids that end a sequence, from the checkpoint's generation settings.
        bos_token_id: the id that begins a sequence, or None.
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
    ties_embedding: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

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
        for name in ("norm_epsilon", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"got {name}={getattr(self, name)}; it must be > 0; mend the checkpoint's"
                    " config"
                )
