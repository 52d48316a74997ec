"""The settings in a Hugging Face config.json, read into a ModelConfig. One row an architecture.

Where a file leaves out what such files do leave out, this takes transformers' own default; the rest
must be there. What a family does not support is refused by the setting's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pallasite.models.checkpoint_fields import (
    Fields,
    as_checkpoint_errors,
    check_layers,
    shown,
)
from pallasite.models.config import ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.hf_rope import RopeRules, read_rope

WindowRule = Callable[[Fields, int, list[bool] | None], list[bool]]
"""Says for each of a number of layers whether it has a window; given layer_types, if stated."""


def _no_windows(fields: Fields, num_layers: int, listed: list[bool] | None) -> list[bool]:
    if fields.has("sliding_window"):
        raise fields.error("sliding_window", "this architecture has no windows")
    return [False] * num_layers


def _every_layer(fields: Fields, num_layers: int, listed: list[bool] | None) -> list[bool]:
    return [fields.has("sliding_window")] * num_layers


def _upper_layers(fields: Fields, num_layers: int, listed: list[bool] | None) -> list[bool]:
    if not fields.flag("use_sliding_window", False) or not fields.has("sliding_window"):
        return [False] * num_layers
    first = fields.integer("max_window_layers", lowest=0)
    return [layer >= first for layer in range(num_layers)] if listed is None else listed


def _all_but_each_nth(fields: Fields, num_layers: int, listed: list[bool] | None) -> list[bool]:
    if listed is not None and not fields.has("sliding_window_pattern"):
        return listed
    period = fields.integer("sliding_window_pattern", 6)
    return [(layer + 1) % period != 0 for layer in range(num_layers)]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What config.json of one architecture means.

    Attributes:
        family: the registry's key.
        rope: what its rope may be.
        windows: which layers have one.
        defaults: what transformers takes for settings that are left out.
        tokens: likewise the special tokens, which a smaller vocabulary may not have.
        has_bias: whether q, k and v have one.
        activation: the setting of the feed-forward's activation, and the value that is supported.
        has_vision: whether the settings are in text_config, and vision's tensors beside.
    """

    family: str
    rope: RopeRules = field(default_factory=RopeRules)
    windows: WindowRule = _no_windows
    defaults: Mapping[str, object] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    has_bias: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    has_vision: bool = False


_GEMMA3 = Architecture(
    family="gemma3",
    rope=RopeRules(types=("default", "linear"), theta=1e6, local_theta=10000.0),
    windows=_all_but_each_nth,
    defaults={
        "head_dim": 256,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
    },
    tokens={"bos_token_id": 2, "eos_token_id": 1},
    activation=("hidden_activation", "gelu_pytorch_tanh"),
)
_QWEN = {"max_window_layers": 28, "num_key_value_heads": 32, "sliding_window": 4096}

# By the one entry of `architectures`.
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(family="llama", tokens={"bos_token_id": 1, "eos_token_id": 2}),
    "MistralForCausalLM": Architecture(
        family="mistral",
        windows=_every_layer,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        tokens={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "Qwen2ForCausalLM": Architecture(
        family="qwen2", windows=_upper_layers, has_bias=True, defaults=_QWEN
    ),
    "Qwen3ForCausalLM": Architecture(
        family="qwen3", windows=_upper_layers, defaults={**_QWEN, "head_dim": 128}
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, has_vision=True),
    "Phi3ForCausalLM": Architecture(
        family="phi3",
        rope=RopeRules(types=("default", "longrope"), is_partial=True),
        windows=_every_layer,
        tokens={"bos_token_id": 1, "eos_token_id": 32000},
    ),
    "Olmo2ForCausalLM": Architecture(family="olmo2", tokens={"eos_token_id": 50279}),
}

# What the language model's names begin with in files with a vision part, and elsewhere; the last
# is how transformers itself has named them since 4.52.
_LANGUAGE = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = ("vision_tower.", "multi_modal_projector.")


def read_architecture(fields: Fields) -> Architecture:
    """Reads which architecture config.json is of. Raises CheckpointError for an unknown one."""
    architectures = fields.values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise fields.error("architectures", "it must be a list of one name")
    name = architectures[0]
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"got architecture {shown(name)} in {fields.source}; known are"
            f" {', '.join(ARCHITECTURES)}; choose a model of one of these"
        )
    return ARCHITECTURES[name]


def tensor_name(architecture: Architecture, stored: str) -> str | None:
    """Returns a tensor's name as families declare it, None for one that no family reads."""
    if stored.endswith(".rotary_emb.inv_freq"):
        return None
    if architecture.has_vision:
        if stored.removeprefix("model.").startswith(_VISION):
            return None
        for prefix, ours in _LANGUAGE.items():
            if stored.startswith(prefix):
                return ours + stored.removeprefix(prefix)
    return stored


def read_config(
    architecture: Architecture,
    whole: Fields,
    ends: Fields,
    shapes: Mapping[str, tuple[int, ...]],
) -> ModelConfig:
    """Reads the settings of the model whose tensors have these shapes, by their declared names.

    `whole` is config.json, and `ends` the generation settings, which say best what ends a text.
    Raises CheckpointError naming the setting that is missing, contradictory or not supported.
    """
    stated = whole.fields("text_config") if architecture.has_vision else whole
    known = Fields({**architecture.defaults, **stated.values}, stated.source)
    vocab_size = known.integer("vocab_size")
    tokens = {name: token for name, token in architecture.tokens.items() if token < vocab_size}
    fields = Fields({**tokens, **known.values}, known.source)
    _refuse_unsupported(architecture, whole, fields)
    model_width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not fields.has("head_dim") and model_width % num_heads:
        raise fields.error("hidden_size", f"without head_dim it must be a multiple of {num_heads}")
    num_layers = fields.integer("num_hidden_layers")
    check_layers(num_layers, shapes)
    head_width = fields.integer("head_dim", model_width // num_heads)
    context_len = fields.integer("max_position_embeddings")
    rope = read_rope(fields, architecture.rope, context_len)
    windows = _read_windows(architecture, fields, num_layers)
    has_tie = fields.flag("tie_word_embeddings", False)
    begins = fields.token_ids("bos_token_id", vocab_size)
    if len(begins) > 1:
        raise fields.error("bos_token_id", "it must be one token id")
    enders = [place for place in (ends, whole, fields) if place.has("eos_token_id")]
    with as_checkpoint_errors():
        return ModelConfig(
            family=architecture.family,
            vocab_size=vocab_size,
            num_layers=num_layers,
            model_width=model_width,
            ffn_width=fields.integer("intermediate_size"),
            num_query_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads),
            head_width=head_width,
            context_len=context_len,
            norm_epsilon=fields.number("rms_norm_eps"),
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            rotary_width=None if rope.part == 1.0 else int(head_width * rope.part),
            query_scale=_read_query_scale(fields, head_width),
            windows=windows,
            local_rope_theta=rope.local_theta if windows else None,
            ties_embedding=has_tie and "lm_head.weight" not in shapes,
            eos_token_ids=enders[0].token_ids("eos_token_id", vocab_size) if enders else (),
            bos_token_id=begins[0] if begins else None,
        )


def _refuse_unsupported(architecture: Architecture, whole: Fields, fields: Fields) -> None:
    has_bias = architecture.has_bias
    if fields.flag("attention_bias", has_bias) != has_bias:
        raise fields.error("attention_bias", f"this architecture has it {str(has_bias).lower()}")
    if fields.flag("mlp_bias", False):
        raise fields.error("mlp_bias", "only projections without bias are supported")
    name, supported = architecture.activation
    if fields.text(name, supported) != supported:
        raise fields.error(name, f"only {supported!r} is supported")
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "only causal attention is supported")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.has(name):
            raise fields.error(name, "capped logits are not supported")
    name = "query_pre_attn_scalar"
    if fields.has(name) and name not in architecture.defaults:
        raise fields.error(name, "it is not supported for this architecture")
    if architecture.has_vision and fields.has("quantization_config"):
        raise fields.error("quantization_config", f"it must stand in {whole.source} itself")


def _read_query_scale(fields: Fields, head_width: int) -> float | None:
    """Reads what scores are multiplied by, None for the usual root of the head's width."""
    divisor = fields.number("query_pre_attn_scalar", float(head_width))
    return None if divisor == head_width else divisor**-0.5


def _read_windows(
    architecture: Architecture, fields: Fields, num_layers: int
) -> tuple[int | None, ...]:
    """Returns each layer's window, and nothing at all where no layer has one."""
    listed = _read_layer_types(fields, num_layers) if fields.has("layer_types") else None
    has_window = architecture.windows(fields, num_layers, listed)
    if listed is not None and listed != has_window:
        raise fields.error("layer_types", "it must agree with the other settings of windows")
    if not any(has_window):
        return ()
    window = fields.integer("sliding_window")
    return tuple(window if has else None for has in has_window)


def _read_layer_types(fields: Fields, num_layers: int) -> list[bool]:
    """Returns for each layer whether it has a window."""
    kinds = {"full_attention": False, "sliding_attention": True}
    listed = fields.items("layer_types")
    if len(listed) != num_layers:
        raise CheckpointError(
            f"got layer_types of {len(listed)} layers in {fields.source}; num_hidden_layers is"
            f" {num_layers}; mend the one that is wrong"
        )
    for kind in listed:
        if not isinstance(kind, str) or kind not in kinds:
            raise CheckpointError(
                f"got {shown(kind)} among the layer_types in {fields.source}; supported are"
                f" {', '.join(kinds)}; choose another checkpoint"
            )
    return [kinds[str(kind)] for kind in listed]
