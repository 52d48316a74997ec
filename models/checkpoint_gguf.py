"""A GGUF file seen as a Hugging Face checkpoint: its names, its order of rows, its config.

Each architecture is one row of `ARCHITECTURES`. What GGUF does differently for "llama":

- Rows of q and k are interleaved within each head: HF's row i of the first half of a head and row
  i of its second half stand side by side, so that rope turns neighbours. Reading undoes it.
- Llama 3's rope scaling is not in the metadata. The file holds what it comes to, the number that
  each rope frequency is divided by (`rope_freqs.weight`); `recover_rope_scaling` works back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pallasite.models.checkpoint_fields import (
    Fields,
    as_checkpoint_errors,
    check_layers,
    shown,
)
from pallasite.models.config import Llama3Rope, ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How GGUF lays out one architecture.

    Attributes:
        family: the registry's key.
        names: GGUF's name to Hugging Face's, for tensors outside the layers.
        layer_names: the same within a layer, after `blk.N.` and `model.layers.N.`.
        query_rows, key_rows: the layer's tensors (Hugging Face's names) whose rows GGUF
            interleaves within each query head, and within each key head.
    """

    family: str
    names: Mapping[str, str]
    layer_names: Mapping[str, str]
    query_rows: frozenset[str] = frozenset()
    key_rows: frozenset[str] = frozenset()


# By `general.architecture`.
ARCHITECTURES = {
    "llama": Architecture(
        family="llama",
        names={
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            "output.weight": "lm_head.weight",
        },
        layer_names={
            "attn_norm.weight": "input_layernorm.weight",
            "attn_q.weight": "self_attn.q_proj.weight",
            "attn_k.weight": "self_attn.k_proj.weight",
            "attn_v.weight": "self_attn.v_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "ffn_norm.weight": "post_attention_layernorm.weight",
            "ffn_gate.weight": "mlp.gate_proj.weight",
            "ffn_up.weight": "mlp.up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
        query_rows=frozenset({"self_attn.q_proj.weight"}),
        key_rows=frozenset({"self_attn.k_proj.weight"}),
    )
}


class GgufCheckpoint:
    """An opened GGUF file; satisfies `Checkpoint`.

    Attributes:
        config: the model's sizes.
        shapes: every tensor's shape. One that the architecture does not know keeps its own name.
        metadata: the file's, for its tokenizer and chat template.
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, object]

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.metadata = self._file.metadata
        fields = Fields(self.metadata, "the GGUF's metadata")
        name = fields.text("general.architecture")
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"got general.architecture={shown(name)}; known are {', '.join(ARCHITECTURES)};"
                " choose a model of one of these"
            )
        self._architecture = ARCHITECTURES[name]
        self._stored_names = _hf_names(self._architecture, self._file)
        self.shapes = {
            hf_name: self._file.tensors[stored].shape
            for hf_name, stored in self._stored_names.items()
        }
        self.config = self._read_config(fields, name)
        self._check_rows()

    def read(self, name: str) -> np.ndarray:
        """See `Checkpoint.read`."""
        if name not in self._stored_names:
            raise CheckpointError(
                f"got no tensor {name!r} in the GGUF; `shapes` lists those there are; convert the"
                " model again"
            )
        tensor = self._file.read(self._stored_names[name])
        if num_heads := self._interleaved_heads(name):
            separate_halves(tensor, num_heads)
        return tensor

    def _interleaved_heads(self, name: str) -> int:
        """How many heads' rows the file interleaves in this tensor, 0 for most."""
        within_layer = re.sub(r"^model\.layers\.\d+\.", "", name)
        if within_layer in self._architecture.query_rows:
            return self.config.num_query_heads
        return self.config.num_kv_heads if within_layer in self._architecture.key_rows else 0

    def _check_rows(self) -> None:
        for name, shape in self.shapes.items():
            num_rows = self._interleaved_heads(name) * self.config.head_width
            if num_rows and shape[0] != num_rows:
                raise CheckpointError(
                    f"got {shape[0]} rows in tensor {name!r}; the metadata's heads make"
                    f" {num_rows}; convert the model again"
                )

    def _read_config(self, fields: Fields, prefix: str) -> ModelConfig:
        _refuse_unsupported(fields, prefix)
        embedding = self.shapes.get("model.embed_tokens.weight", ())
        if len(embedding) != 2:
            raise CheckpointError(
                f"got token_embd.weight of shape {embedding}; it must be [vocabulary, width];"
                " convert the model again"
            )
        vocab_size, model_width = embedding
        _must_be(fields, f"{prefix}.embedding_length", model_width)
        if fields.has(f"{prefix}.vocab_size"):
            _must_be(fields, f"{prefix}.vocab_size", vocab_size)
        tokens = fields.values.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list) and len(tokens) != vocab_size:
            raise CheckpointError(
                f"got {len(tokens)} entries of tokenizer.ggml.tokens; token_embd.weight has"
                f" {vocab_size} rows; convert the model again"
            )
        num_heads = fields.integer(f"{prefix}.attention.head_count")
        head_width = fields.integer(
            f"{prefix}.attention.key_length", max(model_width // num_heads, 1)
        )
        for name in ("attention.value_length", "rope.dimension_count"):
            if fields.has(f"{prefix}.{name}"):
                _must_be(fields, f"{prefix}.{name}", head_width)
        rope_theta = fields.number(f"{prefix}.rope.freq_base", 10000.0)
        begins = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
        ends = dict.fromkeys(
            token_id
            for kind in ("eos", "eot", "eom")
            for token_id in fields.token_ids(f"tokenizer.ggml.{kind}_token_id", vocab_size)
        )
        with as_checkpoint_errors():
            config = ModelConfig(
                family=self._architecture.family,
                vocab_size=vocab_size,
                num_layers=fields.integer(f"{prefix}.block_count"),
                model_width=model_width,
                ffn_width=fields.integer(f"{prefix}.feed_forward_length"),
                num_query_heads=num_heads,
                num_kv_heads=fields.integer(f"{prefix}.attention.head_count_kv", num_heads),
                head_width=head_width,
                context_len=fields.integer(f"{prefix}.context_length"),
                norm_epsilon=fields.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
                rope_theta=rope_theta,
                rope_scaling=self._read_rope_scaling(head_width, rope_theta),
                ties_embedding="lm_head.weight" not in self.shapes,
                eos_token_ids=tuple(ends),
                bos_token_id=begins[0] if begins else None,
            )
        layers = (re.match(r"model\.layers\.(\d+)\.", name) for name in self.shapes)
        check_layers(config, {int(layer[1]) for layer in layers if layer})
        return config

    def _read_rope_scaling(self, head_width: int, rope_theta: float) -> Llama3Rope | None:
        if ROPE_FACTORS not in self._file.tensors:
            return None
        if (shape := self._file.tensors[ROPE_FACTORS].shape) != (head_width // 2,):
            raise CheckpointError(
                f"got tensor {ROPE_FACTORS!r} of shape {shape}; half the head's width is"
                f" ({head_width // 2},); convert the model again"
            )
        return recover_rope_scaling(self._file.read(ROPE_FACTORS), rope_theta)


def _hf_names(architecture: Architecture, file: GgufFile) -> dict[str, str]:
    """Returns Hugging Face's name of each tensor, to the file's name for it."""
    names = {}
    for stored in file.tensors:
        layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(.+)", stored)
        if layer and layer[2] in architecture.layer_names:
            names[f"model.layers.{layer[1]}.{architecture.layer_names[layer[2]]}"] = stored
        elif stored != ROPE_FACTORS:
            names[architecture.names.get(stored, stored)] = stored
    if len(names) + (ROPE_FACTORS in file.tensors) != len(file.tensors):
        raise CheckpointError(
            "got a GGUF that holds a tensor under both GGUF's and Hugging Face's name; each must"
            " stand once; convert the model again"
        )
    return names


def _refuse_unsupported(fields: Fields, prefix: str) -> None:
    if fields.values.get(f"{prefix}.expert_count") not in (None, 0):
        raise fields.error(f"{prefix}.expert_count", "a mixture of experts is not supported here")
    kind = fields.text(f"{prefix}.rope.scaling.type", "none")
    if kind != "none":
        raise fields.error(
            f"{prefix}.rope.scaling.type", "only 'none' and Llama 3's factors are supported"
        )
    for name in ("rope.scale_linear", "rope.scaling.factor"):
        if fields.number(f"{prefix}.{name}", 1.0) != 1.0:
            raise fields.error(f"{prefix}.{name}", "only 1.0 is supported")
    for name in ("attention.sliding_window", "attention.scale"):
        if fields.has(f"{prefix}.{name}"):
            raise fields.error(f"{prefix}.{name}", "it is not supported for this architecture")
    layout = f"{prefix}.tensor_data_layout"
    if fields.text(layout, "Meta AI original pth") != "Meta AI original pth":
        raise fields.error(layout, "only 'Meta AI original pth' is supported")


def _must_be(fields: Fields, name: str, value: int) -> None:
    if fields.integer(name) != value:
        raise fields.error(name, f"the tensors and other settings make it {value}")


def separate_halves(rows: np.ndarray, num_heads: int) -> None:
    """Undoes GGUF's interleaving of each head's rows, in place, one head at a time.

    `rows` is [N*H, D], each head's rows in the order 0, H/2, 1, H/2+1, ...; after it 0, 1, 2, ....
    """
    for head in np.split(rows, num_heads):
        pairs = head.copy()
        head[: len(head) // 2] = pairs[0::2]
        head[len(head) // 2 :] = pairs[1::2]


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
        f"got tensor {ROPE_FACTORS!r} with values that Llama 3's scaling does not make; frequencies"
        " must be kept, blended and stretched by one factor; convert the model again"
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
