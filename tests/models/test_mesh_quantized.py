"""Quantized checkpoints on meshes: what was stored is laid out for the devices, or refused."""

from dataclasses import replace

import numpy as np
import pytest

from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.checkpoint_write import surroundings_of, write_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.registry import make_model
from pallasite.models.sharding import MeshShape
from pallasite.pallas_kernels.target import CPU
from tests.families import FAMILY_MODELS
from tests.family_files import write_family_hf
from tests.models.quantized_cases import AWQ, GPTQ
from tests.models.quantized_files import awq_parts, gptq_parts, random_matrices, write_quantized
from tests.models.running import load, mesh_of
from tests.models.test_mesh import CHUNKS, SIZE, assert_same
from tests.parity.forward import Forward
from tests.tiny_checkpoints import TINY, random_tensors, write_hf

# Nine query heads over three key heads, whose width is that of a group; seven groups of channels.
WIDE_HEADS = replace(TINY, num_query_heads=9, num_kv_heads=3, head_width=32, ffn_width=224)
# On four devices the heads are 0 1, 2 and a padded one, 3 4, 5 and a padded one.
SPLIT_HEADS = replace(TINY, num_query_heads=6)


def stored(folder, config, settings=AWQ, group=32, zeros=range(16), parts=awq_parts):
    matrices = random_matrices(np.random.default_rng(0), config, group, zeros, 4)
    written = {module: parts(matrix) for module, matrix in matrices.items()}
    return write_quantized(folder, config, settings, written)


def logits(folder, num_devices):
    token_ids = np.random.default_rng(1).integers(0, 250, sum(CHUNKS))
    return Forward(folder, "f32", SIZE, mesh=MeshShape(model=num_devices)).logits(token_ids, CHUNKS)


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_stored_groups_go_where_their_heads_go(num_devices, tmp_path):
    folder = stored(tmp_path, WIDE_HEADS)
    assert_same(logits(folder, num_devices), logits(folder, 1))


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("name", ["phi3-window", "phi3-long-rope"])
def test_rows_of_packed_matrices_are_cut_with_their_groups(name, num_devices, tmp_path):
    tiny = FAMILY_MODELS[name]
    source = write_family_hf(tmp_path / "floats", tiny)
    checkpoint = open_checkpoint(source)
    folder = tmp_path / "quantized"
    rules = (("proj", f"int4:{tiny.config.head_width}"),)
    write_checkpoint(checkpoint, rules, surroundings_of(source, checkpoint), folder)
    assert_same(logits(folder, num_devices), logits(folder, 1))


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_group_of_heads_that_part_is_refused(is_stored, tmp_path):
    rules = () if is_stored else (("o_proj", "int4:32"),)
    if is_stored:
        folder = stored(tmp_path, SPLIT_HEADS)
    else:
        folder = write_hf(tmp_path, SPLIT_HEADS, random_tensors(SPLIT_HEADS))
    with pytest.raises(ConfigError, match=r"groups of 32 in .*o_proj.*stay whole.*another mesh"):
        load(open_checkpoint(folder), mesh=mesh_of(1, 4), rules=rules)


def test_whole_rows_of_4_bits_are_refused_where_devices_share_the_row(tmp_path):
    folder = stored(tmp_path, TINY, GPTQ | {"group_size": -1}, None, range(8, 9), gptq_parts)
    with pytest.raises(ConfigError, match=r"int4:64 for .*o_proj.*64 inputs over 2 devices"):
        load(open_checkpoint(folder), mesh=mesh_of(1, 2))
    with pytest.raises(ConfigError, match=r"int4:128 for .*down_proj.*128 inputs over 2 devices"):
        load(open_checkpoint(folder), mesh=mesh_of(1, 2), rules=(("o_proj", "int8"),))
    others = (("o_proj|down_proj", "int8"),)
    load(open_checkpoint(folder), mesh=mesh_of(1, 2), rules=others)


@pytest.mark.parametrize(
    ("rules", "num_devices", "held"),
    [
        ((("q_proj", "int4:64"),), 4, 128),
        ((("down_proj", "int8"), ("gate|up", "int4:64")), 4, 128),
        ((("", "int4:32"),), 3, 192),
        ((), 3, 129),
    ],
)
def test_only_what_multiplies_the_channels_pads_them(rules, num_devices, held):
    model = make_model(TINY, "f32", CPU, num_devices, rules)
    assert model.partition.axis("ffn", TINY.ffn_width).size == held
