"""Smoothing: a matrix's large inputs are made smaller, and its weights larger, without a change.

Rounding a token's inputs with one scale for all of them costs most where a few channels are much
larger than the rest. Each channel is divided by a factor in what makes it, a norm's scale or rows
of another matrix, and the columns that it meets are multiplied. Nothing is left to do at run time.
Source: SmoothQuant (Xiao et al. 2023), with the channels' root mean square on a text in place of
their maximum. `make models` measures what it buys.

Norms that stand before a matrix can be divided, and so can `up`, whose output goes into `down` with
no more than a product between. So it works for every family, but not for all its matrices: OLMo 2
has no norm before q, k, v, gate and up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from pallasite.models.checkpoint import Checkpoint
from pallasite.models.config import ModelConfig
from pallasite.models.errors import ConfigError
from pallasite.models.forms import Form, pattern_name
from pallasite.models.quantize import QuantizedTensor, Stored

STRENGTH = 0.5
"""How much of the differences between inputs goes to the weights: 0 for none, 1 for all."""

# Channels that are never used would be divided by nothing.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Fold:
    """Where the factors of some channels go, in each layer.

    Attributes:
        readers: the matrices that take the channels in; their columns are multiplied.
        maker: what makes the channels. Its last entries or rows, as many, are divided.
        offset: what a norm adds to its scale before it is used.
    """

    readers: tuple[str, ...]
    maker: str
    offset: float = 0.0


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = Fold(("mlp.down_proj",), "mlp.up_proj")
_PRE_NORM = (
    Fold(_QKV, "input_layernorm"),
    Fold(_GATE_UP, "post_attention_layernorm"),
    _DOWN,
)

FOLDS: dict[str, tuple[Fold, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _PRE_NORM),
    "gemma3": (
        Fold(_QKV, "input_layernorm", offset=1.0),
        Fold(_GATE_UP, "pre_feedforward_layernorm", offset=1.0),
        _DOWN,
    ),
    "phi3": (
        Fold(("self_attn.qkv_proj",), "input_layernorm"),
        Fold(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Fold(("mlp.down_proj",), "mlp.gate_up_proj"),
    ),
    "olmo2": (_DOWN,),
}
"""By family."""


class Smoothed:
    """A checkpoint whose tensors are another's, smoothed; satisfies `Checkpoint`.

    It makes no difference to the model's logits but for rounding. Matrices are f32, whatever the
    other has them in.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]

    def __init__(self, checkpoint: Checkpoint, input_sizes: Mapping[str, np.ndarray]) -> None:
        """Reads every matrix that takes part, once, one at a time.

        Args:
            input_sizes: f32 `[L, in]` by `pattern_name`, from `calibration.measure_inputs`.

        Raises ConfigError for a family without folds, and CheckpointError as reading does.
        """
        family = checkpoint.config.family
        if family not in FOLDS:
            raise ConfigError(
                f"got a model of the family {family!r}; smoothing is known for"
                f" {', '.join(FOLDS)}; leave it out"
            )
        self._checkpoint = checkpoint
        self.config = replace(checkpoint.config, stored_forms=())
        self.shapes = checkpoint.shapes
        self._columns: dict[str, np.ndarray] = {}
        self._makers: dict[str, tuple[np.ndarray, float]] = {}
        for layer in range(self.config.num_layers):
            for fold in FOLDS[family]:
                names = [f"model.layers.{layer}.{reader}.weight" for reader in fold.readers]
                weights = np.max([np.abs(self._floats(name)).max(0) for name in names], axis=0)
                factors = _factors(input_sizes[pattern_name(names[0])][layer], weights)
                self._columns |= dict.fromkeys(names, factors)
                self._makers[f"model.layers.{layer}.{fold.maker}.weight"] = (factors, fold.offset)

    def read(self, name: str, form: Form | None = None) -> Stored:
        """See `Checkpoint.read`."""
        if name not in self._columns and name not in self._makers:
            return self._checkpoint.read(name)
        tensor = self._floats(name)
        if name in self._columns:
            tensor *= self._columns[name]
        if name in self._makers:
            factors, offset = self._makers[name]
            last = tensor[-len(factors) :]
            last += np.float32(offset)
            last /= factors.reshape((-1,) + (1,) * (last.ndim - 1))
            last -= np.float32(offset)
        return tensor

    def _floats(self, name: str) -> np.ndarray:
        """Returns a tensor in f32, its caller's own."""
        tensor = self._checkpoint.read(name)
        if isinstance(tensor, QuantizedTensor):
            return tensor.dequantize()
        return tensor.astype(np.float32)


def _factors(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns what each channel is divided by, f32, their geometric mean being 1."""
    log_inputs, log_weights = (_logs(sizes) for sizes in (inputs, weights))
    logs = STRENGTH * log_inputs - (1 - STRENGTH) * log_weights
    return np.exp(logs - logs.mean()).astype(np.float32)


def _logs(sizes: np.ndarray) -> np.ndarray:
    sizes = sizes.astype(np.float64)
    largest = sizes.max()
    if largest == 0:
        return np.zeros(len(sizes))
    return np.log(np.maximum(sizes, _SMALLEST * largest))
