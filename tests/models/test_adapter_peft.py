"""PEFT's adapter_config.json: what it may say, and what would change the answers in silence."""

import numpy as np
import pytest

from pallasite.models.adapter_peft import PeftAdapter
from pallasite.models.adapters import AdapterSpec
from pallasite.models.errors import CheckpointError
from pallasite.models.registry import make_model
from pallasite.pallas_kernels.target import TARGETS
from tests import peft_adapters
from tests.peft_adapters import Peft
from tests.tiny_checkpoints import TINY, random_tensors

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def open_with(tmp_path_factory):
    """Opens an adapter of rank 4 with these settings, where there is room for rank 4."""
    target = TARGETS["cpu"]
    room = AdapterSpec(model=make_model(TINY, "f32", target), target=target, num_slots=1, rank=4)
    tensors = random_tensors(TINY)

    def open_with(**settings):
        peft = Peft(tensors=tensors, settings=settings)
        return PeftAdapter(peft.write(tmp_path_factory.mktemp("adapter")), room)

    return open_with


def arrays(adapter):
    return [array for low_rank in adapter.read().values() for array in (low_rank.a, low_rank.b)]


@pytest.mark.parametrize(
    "start",
    ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "Gaussian", "", [True]],
)
def test_an_adapter_whose_start_took_from_the_base_is_refused(open_with, start):
    """Beside the base as it was, A and B would add what the base still has."""
    message = r"got init_lora_weights=.*; allowed are true, false, .*; save the adapter anew with P"
    with pytest.raises(CheckpointError, match=message):
        open_with(init_lora_weights=start)


@pytest.mark.parametrize("start", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_an_adapter_whose_start_left_the_base_alone_is_read(open_with, start):
    for ours, plain in zip(
        arrays(open_with(init_lora_weights=start)), arrays(open_with()), strict=True
    ):
        np.testing.assert_array_equal(ours, plain)


def test_replicated_layers_are_refused(open_with):
    with pytest.raises(CheckpointError, match=r"got layer_replication=.*not supported here"):
        open_with(layer_replication=[[0, 2], [1, 2]])
    for none in (None, []):
        open_with(layer_replication=none)


@pytest.mark.parametrize("rank", [4.0, 4.9, "4", True, 0, -4])
def test_a_modules_own_rank_is_an_integer_and_not_cut_to_one(open_with, rank):
    for patterns in ({"up_proj": rank}, {UP: rank}):
        with pytest.raises(CheckpointError, match=r"rank_pattern of adapter_config.json; it must"):
            open_with(rank_pattern=patterns)


@pytest.mark.parametrize("alpha", ["8", True, 0, -8.0, float("nan")])
def test_a_modules_own_alpha_is_a_number_above_0(open_with, alpha):
    with pytest.raises(CheckpointError, match=r"alpha_pattern of adapter_config.json; it must be"):
        open_with(alpha_pattern={"up_proj": alpha}).read()


def test_a_modules_own_rank_and_alpha_are_its_own(open_with):
    plain = open_with().read()
    ranks = dict.fromkeys(peft_adapters.TARGETS, 4)
    own = open_with(r=3, rank_pattern=ranks, alpha_pattern={"up_proj": 16.0}).read()
    for key, low_rank in plain.items():
        times = 2 if "up_proj" in key else 1
        np.testing.assert_array_equal(own[key].a, low_rank.a)
        np.testing.assert_allclose(own[key].b, times * low_rank.b, rtol=1e-6)
