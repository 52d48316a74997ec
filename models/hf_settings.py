"""The Hugging Face config.json of a model, made from its ModelConfig: what `hf_config` reads."""

from collections.abc import Mapping

from pallasite.models.checkpoint_fields import Fields
from pallasite.models.config import LinearRope, Llama3Rope, LongRope, ModelConfig, RopeScaling
from pallasite.models.errors import CheckpointError, ConfigError
from pallasite.models.hf_config import ARCHITECTURES, read_config

# transformers' own name of a family, where it is another.
_MODEL_TYPES = {"gemma3": "gemma3_text"}


def hf_settings(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Returns config.json's object, in the form that transformers wrote before version 5.

    Args:
        shapes: of the model's tensors, by name.

    Raises ConfigError where the object would be read as another config than this.
    """
    name = next((name for name, a in ARCHITECTURES.items() if a.family == config.family), None)
    if name is None:
        raise ConfigError(
            f"got a model of the family {config.family!r}, whose config.json is not known; known"
            f" are those of {', '.join(sorted({a.family for a in ARCHITECTURES.values()}))}; choose"
            " another model"
        )
    architecture = ARCHITECTURES[name]
    activation, function = architecture.activation
    settings: dict[str, object] = {
        "architectures": [name],
        "model_type": _MODEL_TYPES.get(config.family, config.family),
        activation: function,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "head_dim": config.head_width,
        "hidden_size": config.model_width,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.context_len,
        "num_attention_heads": config.num_query_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.ties_embedding,
        "vocab_size": config.vocab_size,
    }
    settings |= _windows(config) | _rope(config)
    if "query_pre_attn_scalar" in architecture.defaults:
        settings["query_pre_attn_scalar"] = round(config.attention_scale**-2, 6)
    fields = Fields(settings, "config.json")
    try:
        read = read_config(architecture, fields, fields, shapes)
    except CheckpointError as error:
        raise ConfigError(f"this model's config.json cannot be made: {error}") from error
    for field in ModelConfig.__dataclass_fields__:
        if field not in ("stored_forms", "block_forms") and getattr(read, field) != getattr(
            config, field
        ):
            raise ConfigError(
                f"got {field}={getattr(config, field)!r} in the model's config; a config.json of"
                f" {name} would give {getattr(read, field)!r}; start from a Hugging Face folder"
            )
    return settings


def _windows(config: ModelConfig) -> dict[str, object]:
    windows = config.windows or (None,) * config.num_layers
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    sizes = [window for window in windows if window is not None]
    return {
        "layer_types": kinds,
        "max_window_layers": kinds.index("sliding_attention") if sizes else config.num_layers,
        "sliding_window": sizes[0] if sizes else None,
        "use_sliding_window": bool(sizes),
    }


def _rope(config: ModelConfig) -> dict[str, object]:
    settings: dict[str, object] = {
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config.rope_scaling),
    }
    if config.local_rope_theta is not None:
        settings["rope_local_base_freq"] = config.local_rope_theta
    if config.rotary_width is not None:
        settings["partial_rotary_factor"] = config.rotary_width / config.head_width
    if isinstance(config.rope_scaling, LongRope):
        settings["original_max_position_embeddings"] = config.rope_scaling.original_context_len
    return settings


def _scaling(scaling: RopeScaling | None) -> dict[str, object] | None:
    match scaling:
        case LinearRope():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Rope():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_context_len,
            }
        case LongRope():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
            }
    return None
