"""config.json made from a ModelConfig: read again, it gives that config."""

import json
from dataclasses import replace

import pytest

from pallasite.models.checkpoint_fields import Fields
from pallasite.models.errors import ConfigError
from pallasite.models.hf_config import read_architecture, read_config
from pallasite.models.hf_settings import hf_settings
from tests.families import FAMILY_MODELS
from tests.family_model import tensor_shapes
from tests.tiny_checkpoints import TINY, hf_config, random_tensors

TINY_SHAPES = {name: tensor.shape for name, tensor in random_tensors(TINY).items()}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_familys_config_comes_back(name):
    model = FAMILY_MODELS[name]
    shapes = tensor_shapes(model.text)
    settings = json.loads(json.dumps(hf_settings(model.config, shapes)))
    fields = Fields(settings, "config.json")
    assert read_config(read_architecture(fields), fields, fields, shapes) == model.config
    assert settings["model_type"] == model.text["model_type"]


def test_a_llamas_settings_are_those_that_transformers_writes():
    settings = hf_settings(TINY, TINY_SHAPES)
    expected = hf_config(TINY)
    # Those that say what is so anyway.
    for name in ("attention_bias", "mlp_bias"):
        assert expected.pop(name) is False
    assert {name: settings[name] for name in expected} == expected


def test_forms_are_not_among_the_settings():
    config = replace(TINY, stored_forms=(("q_proj", "int8"),))
    assert hf_settings(config, TINY_SHAPES) == hf_settings(TINY, TINY_SHAPES)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"family": "gpt2"}, "'gpt2'.*llama"),
        ({"windows": (8, None)}, "no windows"),
        ({"query_scale": 0.125}, "query_scale=0.125.*None"),
        ({"rotary_width": 8}, "partial_rotary_factor"),
        ({"local_rope_theta": 1e4}, r"local_rope_theta=10000\.0.*None"),
    ],
)
def test_a_config_that_the_architecture_cannot_have_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        hf_settings(replace(TINY, **changes), TINY_SHAPES)
