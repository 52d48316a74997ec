"""A GGUF file's metadata, read into a ModelConfig.

Where llama.cpp's converter leaves out what a model needs, llama.cpp holds it in its own code for
the architecture, and so does this: Gemma 3's pattern of windows, the rope of layers with a window
and the scale of scores.
"""

from collections.abc import Mapping

from pallasite.models.checkpoint_fields import (
    Fields,
    as_checkpoint_errors,
    check_layers,
)
from pallasite.models.config import ModelConfig
from pallasite.models.errors import CheckpointError
from pallasite.models.gguf_architectures import Architecture
from pallasite.models.gguf_ends import ends_by_text
from pallasite.models.gguf_file import GgufFile
from pallasite.models.gguf_rope import read_rope_scaling

_GEMMA3_PERIOD = 6
_GEMMA3_LOCAL_THETA = 10000.0
# The one size of Gemma 3 (27B) whose scores have a scale of their own is known by its depth.
_GEMMA3_LAYERS_OF_27B = 62


def read_config(
    file: GgufFile, architecture: Architecture, prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    """Reads the config of a file whose tensors have these shapes, under Hugging Face's names.

    `prefix` is what the metadata's keys begin with. Raises CheckpointError naming the entry that is
    missing, contradictory or not supported.
    """
    fields = Fields(file.metadata, "the GGUF's metadata")
    family = architecture.family
    _refuse_unsupported(fields, prefix, family)
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
        raise CheckpointError(
            f"got token_embd.weight of shape {embedding}; it must be [vocabulary, width];"
            " convert the model again"
        )
    vocab_size, model_width = embedding
    _check_vocabulary(fields, prefix, vocab_size)
    _must_be(fields, f"{prefix}.embedding_length", model_width)
    num_layers = fields.integer(f"{prefix}.block_count")
    check_layers(num_layers, shapes)
    num_heads = fields.integer(f"{prefix}.attention.head_count")
    head_width = fields.integer(f"{prefix}.attention.key_length", max(model_width // num_heads, 1))
    rotary_width = None
    if family == "phi3":
        rotary_width = fields.integer(f"{prefix}.rope.dimension_count", head_width)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.has(f"{prefix}.{name}") and not (rotary_width and name.startswith("rope")):
            _must_be(fields, f"{prefix}.{name}", head_width)
    begins = fields.token_ids("tokenizer.ggml.bos_token_id", vocab_size)
    ends = dict.fromkeys(
        token_id
        for kind in ("eos", "eot", "eom")
        for token_id in fields.token_ids(f"tokenizer.ggml.{kind}_token_id", vocab_size)
    )
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        ends |= dict.fromkeys(ends_by_text(tokens))
    windows = _read_windows(fields, prefix, family, num_layers)
    local_theta = None
    if family == "gemma3" and windows:
        local_theta = fields.number(f"{prefix}.rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    query_scale = None
    if family == "gemma3" and num_layers == _GEMMA3_LAYERS_OF_27B:
        divisor = model_width // num_heads
        query_scale = None if divisor == head_width else divisor**-0.5
    with as_checkpoint_errors():
        return ModelConfig(
            family=family,
            vocab_size=vocab_size,
            num_layers=num_layers,
            model_width=model_width,
            ffn_width=fields.integer(f"{prefix}.feed_forward_length"),
            num_query_heads=num_heads,
            num_kv_heads=fields.integer(f"{prefix}.attention.head_count_kv", num_heads),
            head_width=head_width,
            context_len=fields.integer(f"{prefix}.context_length"),
            norm_epsilon=fields.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
            rope_theta=fields.number(f"{prefix}.rope.freq_base", 10000.0),
            rope_scaling=read_rope_scaling(
                file, fields, prefix, architecture.settings, rotary_width or head_width
            ),
            rotary_width=None if rotary_width == head_width else rotary_width,
            query_scale=query_scale,
            windows=windows,
            local_rope_theta=local_theta,
            ties_embedding="lm_head.weight" not in shapes,
            eos_token_ids=tuple(ends),
            bos_token_id=begins[0] if begins else None,
        )


def _read_windows(
    fields: Fields, prefix: str, family: str, num_layers: int
) -> tuple[int | None, ...]:
    """Returns each layer's window, and nothing at all where no layer has one.

    Files of Phi-3 must say 0 for no window: the first ones left out those that there were. Files of
    Gemma 3 leave the entry out.
    """
    name = f"{prefix}.attention.sliding_window"
    if family not in ("gemma3", "phi3"):
        return ()
    window = fields.integer(name, 0 if family == "gemma3" else None, lowest=0)
    if not window:
        return ()
    if family == "phi3":
        return (window,) * num_layers
    has_window = _read_pattern(fields, f"{name}_pattern", num_layers)
    return tuple(window if has else None for has in has_window) if any(has_window) else ()


def _read_pattern(fields: Fields, name: str, num_layers: int) -> list[bool]:
    """Reads which layers have a window: each one's flag, or that each n-th has none."""
    if not isinstance(fields.values.get(name), list):
        period = fields.integer(name, _GEMMA3_PERIOD)
        return [(layer + 1) % period != 0 for layer in range(num_layers)]
    flags = fields.items(name)
    if len(flags) != num_layers or not all(type(flag) is bool for flag in flags):
        raise fields.error(name, f"it must be a number, or true or false for {num_layers} layers")
    return [bool(flag) for flag in flags]


def _check_vocabulary(fields: Fields, prefix: str, vocab_size: int) -> None:
    if fields.has(f"{prefix}.vocab_size"):
        _must_be(fields, f"{prefix}.vocab_size", vocab_size)
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab_size:
        raise CheckpointError(
            f"got {len(tokens)} entries of tokenizer.ggml.tokens; token_embd.weight has"
            f" {vocab_size} rows; convert the model again"
        )


def _refuse_unsupported(fields: Fields, prefix: str, family: str) -> None:
    if fields.values.get(f"{prefix}.expert_count") not in (None, 0):
        raise fields.error(f"{prefix}.expert_count", "a mixture of experts is not supported here")
    unsupported = ["attention.scale", "attn_logit_softcapping", "final_logit_softcapping"]
    if family != "gemma3":
        unsupported += ["attention.sliding_window_pattern", "rope.freq_base_swa"]
    if family not in ("gemma3", "phi3"):
        unsupported.append("attention.sliding_window")
    for name in unsupported:
        if fields.has(f"{prefix}.{name}"):
            raise fields.error(f"{prefix}.{name}", "it is not supported for this architecture")
    if not fields.flag(f"{prefix}.attention.causal", True):
        raise fields.error(f"{prefix}.attention.causal", "only causal attention is supported")
    layout = f"{prefix}.tensor_data_layout"
    if fields.text(layout, "Meta AI original pth") != "Meta AI original pth":
        raise fields.error(layout, "only 'Meta AI original pth' is supported")


def _must_be(fields: Fields, name: str, value: int) -> None:
    if fields.integer(name) != value:
        raise fields.error(name, f"the tensors and other settings make it {value}")
