"""For each tiny model the changes of its config.json that must change its logits."""

from collections.abc import Mapping

from tests.family_model import Json
from tests.family_settings import WINDOW, kinds


def changed(hf: Json, change: Json) -> dict[str, object]:
    """Returns `hf` with the change in it; objects within objects are changed, not replaced."""
    result = dict(hf)
    for name, value in change.items():
        old = hf.get(name)
        is_object = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = changed(old, value) if is_object else value
    return result


FAMILY_CHANGES: dict[str, tuple[Json, ...]] = {
    "llama-one-key-head": (
        {"rope_scaling": {"factor": 5.0}},
        {"rope_scaling": None},
        {"rope_theta": 520.0},
    ),
    "llama-eight-key-heads": (
        {"rope_parameters": {"factor": 7.0}},
        {"rope_parameters": {"original_max_position_embeddings": 64}},
    ),
    "mistral-window": ({"sliding_window": WINDOW + 1}, {"sliding_window": None}),
    "mistral-narrow-heads": ({"rms_norm_eps": 1e-2}, {"sliding_window": 100}),
    "qwen2-tied": ({"use_sliding_window": True}, {"rope_theta": 1010.0}),
    "qwen2-windows": ({"sliding_window": WINDOW - 1}, {"layer_types": kinds("sfs")}),
    "qwen3-wide-heads": ({"rope_parameters": {"rope_theta": 10100.0}}, {"rms_norm_eps": 1e-2}),
    "qwen3-windows": ({"sliding_window": WINDOW + 1}, {"max_window_layers": 2}),
    "gemma3-one-key-head": (
        {"rope_local_base_freq": 101.0},
        {"rope_theta": 1010.0},
        {"sliding_window": WINDOW + 1},
        {"sliding_window_pattern": 5},
    ),
    "gemma3-linear-rope": (
        {"layer_types": kinds("sfssfsf")},
        {"query_pre_attn_scalar": 25},
        {"rope_parameters": {"full_attention": {"factor": 4.0}}},
        {"rope_parameters": {"sliding_attention": {"rope_theta": 101.0}}},
    ),
    "gemma3-with-vision": (
        {"text_config": {"rope_scaling": {"factor": 2.0}}},
        {"text_config": {"rope_theta": 1e5}},
        {"text_config": {"rope_local_base_freq": 9000.0}},
        {"text_config": {"sliding_window": WINDOW + 1}},
    ),
    "phi3-window": ({"sliding_window": WINDOW + 1}, {"rope_theta": 9000.0}),
    "phi3-long-rope": (
        {"rope_parameters": {"long_factor": [1.5, 4.0, 8.0]}},
        {"rope_parameters": {"attention_factor": 1.1}},
    ),
    "phi3-short-rope": (
        {"rope_scaling": {"short_factor": [1.0, 1.25, 1.5, 2.1]}},
        {"rope_scaling": {"attention_factor": 1.2}},
    ),
    "olmo2": ({"rope_theta": 260.0}, {"rms_norm_eps": 1e-2}),
    "olmo2-groups": ({"rope_parameters": {"rope_theta": 9900.0}},),
}
