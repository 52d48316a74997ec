"""Tiny random models of every family: config.json's object, and what the readers must make of it.

The objects are those that transformers writes, for some models before its version 5 (rope_theta
and rope_scaling on their own, windows by a pattern) and for others since (rope_parameters,
layer_types). Windows are shorter than the text.
"""

import math

from pallasite.models.config import LinearRope, Llama3Rope, LongRope
from tests.family_model import FamilyModel
from tests.family_settings import (
    V4,
    V5,
    WINDOW,
    gemma3,
    kinds,
    llama,
    mistral,
    olmo2,
    our_config,
    phi3,
    qwen2,
    qwen3,
)

# Nine query heads over three key heads: no mesh of 2, 4 or 8 divides them.
_NINE_OVER_THREE = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
_OUR_NINE_OVER_THREE = {"model_width": 72, "num_query_heads": 9, "num_kv_heads": 3, "head_width": 8}
_EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
_OUR_EIGHT_HEADS = {"num_query_heads": 8, "num_kv_heads": 8}


FAMILY_MODELS = {
    "llama-one-key-head": FamilyModel(
        hf=llama(
            **V4,
            head_dim=16,
            num_key_value_heads=1,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            rope_theta=500.0,
            tie_word_embeddings=True,
        ),
        config=our_config(
            "llama",
            num_kv_heads=1,
            rope_scaling=LinearRope(factor=4.0),
            rope_theta=500.0,
            ties_embedding=True,
        ),
        seed=101,
    ),
    "llama-eight-key-heads": FamilyModel(
        # Of the 8 frequencies three are kept, three blended and two stretched.
        hf=llama(
            **V5,
            **_EIGHT_HEADS,
            head_dim=16,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        config=our_config(
            "llama",
            **_OUR_EIGHT_HEADS,
            rope_theta=100.0,
            rope_scaling=Llama3Rope(
                factor=8.0,
                low_frequency_factor=1.0,
                high_frequency_factor=4.0,
                original_context_len=128,
            ),
        ),
        seed=102,
    ),
    "mistral-window": FamilyModel(
        hf=mistral(**V4, rope_theta=10000.0, sliding_window=WINDOW),
        config=our_config("mistral", windows=(WINDOW, WINDOW)),
        seed=103,
        has_gguf=False,
    ),
    "mistral-narrow-heads": FamilyModel(
        # Like Mistral NeMo's, the heads together are narrower than the model.
        hf=mistral(
            **V5,
            **_NINE_OVER_THREE,
            head_dim=6,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            sliding_window=None,
        ),
        config=our_config(
            "mistral",
            **{**_OUR_NINE_OVER_THREE, "head_width": 6},
            norm_epsilon=1e-3,
            rope_theta=1000.0,
        ),
        seed=104,
    ),
    "qwen2-tied": FamilyModel(
        # As in most of Qwen's files, a window is there and not used.
        hf=qwen2(
            **V4,
            num_key_value_heads=4,
            max_window_layers=1,
            rope_scaling=None,
            rope_theta=1000.0,
            sliding_window=WINDOW,
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        config=our_config("qwen2", num_kv_heads=4, rope_theta=1000.0, ties_embedding=True),
        seed=105,
    ),
    "qwen2-windows": FamilyModel(
        hf=qwen2(
            **V5,
            **_NINE_OVER_THREE,
            layer_types=kinds("fss"),
            max_window_layers=1,
            num_hidden_layers=3,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            sliding_window=WINDOW,
            use_sliding_window=True,
        ),
        config=our_config(
            "qwen2",
            **_OUR_NINE_OVER_THREE,
            num_layers=3,
            rope_theta=1000.0,
            windows=(None, WINDOW, WINDOW),
        ),
        seed=106,
        has_gguf=False,
    ),
    "qwen3-wide-heads": FamilyModel(
        hf=qwen3(
            **V5,
            **_EIGHT_HEADS,
            head_dim=16,
            layer_types=kinds("ff"),
            max_window_layers=28,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            sliding_window=None,
            tie_word_embeddings=True,
            use_sliding_window=False,
        ),
        config=our_config("qwen3", **_OUR_EIGHT_HEADS, ties_embedding=True),
        seed=107,
    ),
    "qwen3-windows": FamilyModel(
        hf=qwen3(
            **V4,
            head_dim=16,
            max_window_layers=1,
            num_hidden_layers=3,
            num_key_value_heads=1,
            rope_scaling=None,
            rope_theta=1000.0,
            sliding_window=WINDOW,
            use_sliding_window=True,
        ),
        config=our_config(
            "qwen3", num_layers=3, num_kv_heads=1, rope_theta=1000.0, windows=(None, WINDOW, WINDOW)
        ),
        seed=108,
        has_gguf=False,
    ),
    "gemma3-one-key-head": FamilyModel(
        hf=gemma3(
            **V4,
            num_key_value_heads=1,
            rope_local_base_freq=100.0,
            rope_scaling=None,
            rope_theta=1000.0,
            sliding_window_pattern=6,
        ),
        config=our_config(
            "gemma3",
            num_layers=8,
            num_kv_heads=1,
            norm_epsilon=1e-6,
            rope_theta=1000.0,
            local_rope_theta=100.0,
            windows=(*(WINDOW,) * 5, None, WINDOW, WINDOW),
            ties_embedding=True,
        ),
        seed=109,
    ),
    "gemma3-linear-rope": FamilyModel(
        # A pattern and a scale of scores that no released model has.
        hf=gemma3(
            **V5,
            _sliding_window_pattern=6,
            layer_types=kinds("sfssfss"),
            num_hidden_layers=7,
            num_key_value_heads=4,
            query_pre_attn_scalar=24,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            use_bidirectional_attention=False,
        ),
        config=our_config(
            "gemma3",
            num_layers=7,
            num_kv_heads=4,
            norm_epsilon=1e-6,
            rope_theta=1000.0,
            local_rope_theta=100.0,
            rope_scaling=LinearRope(factor=8.0),
            query_scale=24**-0.5,
            windows=(WINDOW, None, WINDOW, WINDOW, None, WINDOW, WINDOW),
            ties_embedding=True,
        ),
        seed=110,
        has_gguf=False,
    ),
    "gemma3-with-vision": FamilyModel(
        # As in Gemma 3's own files, what is as transformers has it anyway is left out.
        hf={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [70],
            "image_token_index": 71,
            "mm_tokens_per_image": 4,
            "model_type": "gemma3",
            "text_config": {
                "bos_token_id": 69,
                "head_dim": 16,
                "hidden_size": 64,
                "intermediate_size": 96,
                "max_position_embeddings": 256,
                "model_type": "gemma3_text",
                "num_attention_heads": 8,
                "num_hidden_layers": 7,
                "num_key_value_heads": 4,
                "query_pre_attn_scalar": 16,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": WINDOW,
                "vocab_size": 72,
            },
            **V4,
            "vision_config": {
                "hidden_size": 16,
                "image_size": 28,
                "intermediate_size": 32,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        config=our_config(
            "gemma3",
            num_layers=7,
            num_query_heads=8,
            num_kv_heads=4,
            norm_epsilon=1e-6,
            rope_theta=1e6,
            local_rope_theta=10000.0,
            rope_scaling=LinearRope(factor=8.0),
            windows=(*(WINDOW,) * 5, None, WINDOW),
            ties_embedding=True,
        ),
        seed=111,
    ),
    "phi3-window": FamilyModel(
        hf=phi3(
            **V4,
            num_key_value_heads=4,
            original_max_position_embeddings=256,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=WINDOW,
        ),
        config=our_config("phi3", num_kv_heads=4, windows=(WINDOW, WINDOW)),
        seed=112,
    ),
    "phi3-long-rope": FamilyModel(
        hf=phi3(
            **V5,
            **_NINE_OVER_THREE,
            original_max_position_embeddings=64,
            partial_rotary_factor=0.75,
            rope_parameters={
                "long_factor": [1.5, 4.0, 9.5],
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 0.75,
                "rope_theta": 100.0,
                "rope_type": "longrope",
                "short_factor": [1.0, 1.25, 1.5],
                "type": "longrope",
            },
            sliding_window=None,
        ),
        config=our_config(
            "phi3",
            **_OUR_NINE_OVER_THREE,
            rope_theta=100.0,
            rotary_width=6,
            rope_scaling=LongRope(
                short_factors=(1.0, 1.25, 1.5),
                long_factors=(1.5, 4.0, 9.5),
                original_context_len=64,
                attention_factor=(1 + math.log(256 / 64) / math.log(64)) ** 0.5,
            ),
        ),
        seed=113,
    ),
    "phi3-short-rope": FamilyModel(
        hf=phi3(
            **V4,
            original_max_position_embeddings=256,
            partial_rotary_factor=0.5,
            rope_scaling={
                "attention_factor": 1.25,
                "long_factor": [1.5, 3.0, 6.0, 12.0],
                "short_factor": [1.0, 1.25, 1.5, 2.0],
                "type": "longrope",
            },
            rope_theta=100.0,
            sliding_window=None,
            tie_word_embeddings=True,
        ),
        config=our_config(
            "phi3",
            rope_theta=100.0,
            rotary_width=8,
            rope_scaling=LongRope(
                short_factors=(1.0, 1.25, 1.5, 2.0),
                long_factors=(1.5, 3.0, 6.0, 12.0),
                original_context_len=256,
                attention_factor=1.25,
            ),
            ties_embedding=True,
        ),
        seed=114,
        has_gguf=False,
    ),
    "olmo2": FamilyModel(
        # The frequencies are powers of 2. Of others torch rounds some the other way, in their last
        # bit, and at one place of this model's text that alone moves a logit by 4e-5.
        hf=olmo2(**V4, num_key_value_heads=4, rope_scaling=None, rope_theta=256.0),
        config=our_config("olmo2", num_kv_heads=4, rope_theta=256.0),
        seed=115,
    ),
    "olmo2-groups": FamilyModel(
        hf=olmo2(
            **V5,
            **_NINE_OVER_THREE,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
        ),
        config=our_config("olmo2", **_OUR_NINE_OVER_THREE, ties_embedding=True),
        seed=116,
    ),
}
