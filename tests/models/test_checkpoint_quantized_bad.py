"""Quantized folders whose settings or tensors are wrong or not supported: named and refused."""

import numpy as np
import pytest

from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.errors import CheckpointError
from tests.models.quantized_cases import (
    AWQ,
    CASES,
    TOKEN,
    UP,
    weights,
)
from tests.models.quantized_files import (
    awq_parts,
    random_matrices,
    write_quantized,
)
from tests.tiny_checkpoints import TINY


def packed_group(**changes: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights(4, 32)} | changes
    return {"config_groups": {"group_0": group}}


SETTINGS = [
    ("awq", {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'.*awq, gptq, compressed"),
    ("awq", {"quant_method": ...}, "no 'quant_method' in quantization_config of config.json"),
    ("awq", {"quant_method": "gptq"}, r"_proj\.scales.*\[4, 64\].*must be \[32, 8\]"),
    ("awq", {"bits": 8}, "bits=8.*AWQ"),
    ("awq", {"bits": ...}, "no 'bits'"),
    ("awq", {"bits": "4"}, "bits='4'"),
    ("awq", {"version": "gemv"}, "version='gemv'.*gemm"),
    ("awq", {"zero_point": False}, "zero_point=False.*true"),
    ("awq", {"group_size": 31}, "group_size=31.*even"),
    ("awq", {"group_size": 0}, "group_size=0"),
    ("awq", {"group_size": ...}, "no 'group_size'"),
    ("awq", {"group_size": 64}, r"qzeros.*\[4, 8\].*must be \[2, 8\]"),
    ("awq", {"group_size": 48}, "qweight.*inputs must be whole groups of 48"),
    ("gptq", {"bits": 3}, "bits=3.*4 and 8"),
    ("gptq", {"bits": 8}, r"scales' of shape \[4, 64\].*must be \[2, 64\]"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'.*gptq_v2"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format=True"),
    ("gptq", {"dynamic": {"-:.*": {}}}, "dynamic=a dict.*only {}"),
    ("packed", {"quantization_status": "frozen"}, "quantization_status='frozen'"),
    ("packed", {"format": "marlin-24"}, "format='marlin-24'.*pack-quantized"),
    ("packed", {"format": ...}, "no 'format'"),
    ("packed", {"format": "int-quantized"}, "num_bits=4.*must be 8 with type 'int'"),
    ("packed", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ("packed", {"transform_config": {"config_groups": {}}}, "transform_config"),
    ("packed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("packed", {"config_groups": {}}, "config_groups"),
    ("packed", {"config_groups": ["W4A16"]}, "config_groups=a list"),
    ("packed", {"config_groups": {"W4A16": ["Linear"]}}, "W4A16=a list"),
    ("packed", packed_group(weights=None), "no 'weights'"),
    ("packed", packed_group(weights=weights(4, 32, dynamic=True)), "dynamic=True"),
    ("packed", packed_group(weights=weights(4, 32, actorder="group")), "actorder='group'"),
    ("packed", packed_group(weights=weights(4, 32, strategy="tensor")), "strategy='tensor'"),
    ("packed", packed_group(weights=weights(4, 33)), "group_size=33"),
    ("packed", packed_group(weights=weights(4, 48)), "weight_packed.*whole groups of 48"),
    ("packed", packed_group(weights=weights(4, 32, type="float")), "num_bits=4"),
    ("packed", packed_group(weights=weights(8, 32, symmetric=False)), "symmetric=False"),
    ("packed", packed_group(weights=weights(4, 32, symmetric=False)), "no tensor.*zero_point"),
    ("packed", packed_group(weights=weights(2, 32)), "num_bits=2"),
    ("packed", packed_group(input_activations=TOKEN), "input_activations.*int8 weights"),
    ("packed", packed_group(output_activations=TOKEN), "output_activations"),
    ("packed", packed_group(targets="Linear"), "targets='Linear'.*a list"),
    ("packed", packed_group(targets=["re:(a+)+$"]), r"'re:\(a\+\)\+\$'.*few repeats"),
    ("packed", packed_group(targets=["re:(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)"]), "re:"),
    ("packed", packed_group(targets=["re:(.*"]), "regular expression"),
    ("w8a8", {"format": "pack-quantized"}, "no tensor.*weight_packed"),
    ("w8a8", {"format": "float-quantized"}, "num_bits=8.*type 'float'"),
]


def input_group(**changes: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights(8, None)}
    return {"config_groups": {"group_0": group | {"input_activations": TOKEN | changes}}}


SETTINGS += [
    ("w8a8", input_group(dynamic=False), "dynamic=False.*must be True"),
    ("w8a8", input_group(dynamic="local"), "dynamic='local'"),
    ("w8a8", input_group(symmetric=False), "symmetric=False"),
    ("w8a8", input_group(num_bits=4), "num_bits=4"),
    ("w8a8", input_group(type="float"), "type='float'"),
    ("w8a8", input_group(strategy="tensor"), "strategy='tensor'.*'token'"),
    ("w8a8", input_group(strategy="group", group_size=32), "strategy='group'"),
]


@pytest.mark.parametrize(("case", "changes", "named"), SETTINGS)
def test_settings_that_are_not_supported_are_named(case, changes, named, rng, tmp_path):
    case = {"packed": "packed, symmetric"}.get(case, case)
    settings, (group, zeros, num_bits), write, _ = CASES[case]
    matrices = random_matrices(rng, TINY, group, zeros, num_bits)
    parts = {module: write(matrix) for module, matrix in matrices.items()}
    settings = {name: value for name, value in (settings | changes).items() if value is not ...}
    folder = write_quantized(tmp_path, TINY, settings, parts)
    with pytest.raises(CheckpointError, match=named) as error:
        HfCheckpoint(folder)
    assert str(folder) not in str(error.value)


@pytest.mark.parametrize("name", ["awq", "gptq", "packed, asymmetric", "w8a8 groups"])
def test_damaged_settings_give_checkpoint_errors_only(name, rng, tmp_path):
    settings, (group, zeros, num_bits), write, _ = CASES[name]
    matrices = random_matrices(rng, TINY, group, zeros, num_bits)
    parts = {module: write(matrix) for module, matrix in matrices.items()}
    path = write_quantized(tmp_path, TINY, settings, parts) / "config.json"
    whole = path.read_bytes()
    start = whole.index(b"quantization_config")
    num_refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for place in rng.integers(start, len(content), rng.integers(1, 4)):
            content[place] = rng.integers(32, 127)
        path.write_bytes(content)
        try:
            HfCheckpoint(tmp_path).read(f"{UP}.weight")
        except CheckpointError:
            num_refused += 1
    assert num_refused >= 50


def test_settings_that_nothing_is_quantized_by_are_refused(tmp_path):
    folder = write_quantized(tmp_path, TINY, AWQ, {})
    with pytest.raises(CheckpointError, match="'awq' and no quantized tensor"):
        HfCheckpoint(folder)


# A part of one matrix, what becomes of it, and what the message says, when it is opened or read.
PARTS = [
    ("awq", "qzeros", None, "no tensor.*up_proj.qzeros"),
    ("awq", "g_idx", np.zeros(64, np.int32), "up_proj.g_idx"),
    ("awq", "qweight", np.zeros((64, 16), np.int64), "up_proj.qweight.*int64.*int32"),
    ("awq", "qweight", np.zeros(64, np.int32), r"up_proj.qweight.*\[64\]"),
    ("awq", "qweight", np.zeros((0, 16), np.int32), r"up_proj.qweight.*\[0, 16\]"),
    ("awq", "scales", np.zeros((2, 128), np.int32), "up_proj.scales.*int32.*float16"),
    ("awq", "scales", np.ones((2, 127), np.float16), r"up_proj.scales.*\[2, 127\].*\[2, 128\]"),
    ("awq", "scales", np.full((2, 128), np.inf, np.float16), "256 values.*up_proj.scales"),
    ("awq", "weight", np.ones((128, 64), np.float32), "up_proj.weight"),
    ("gptq", "qzeros", np.zeros((2, 15), np.int32), "up_proj.qzeros"),
    ("gptq", "g_idx", np.arange(64, dtype=np.int32)[::-1] // 32, "desc_act.*up_proj|up_proj.*desc"),
    ("gptq", "g_idx", np.zeros(63, np.int32), "up_proj.g_idx"),
    ("gptq of 8 bits", "qzeros", np.zeros((2, 32), np.int32), "zeros.*up_proj.*symmetric"),
    ("packed, symmetric", "weight_shape", None, "no tensor.*up_proj.weight_shape"),
    ("packed, symmetric", "weight_shape", np.array([128, 63]), r"\[128, 63\].*\[128, 64\]"),
    ("packed, symmetric", "weight_shape", np.ones((1, 2), np.int64), "up_proj.weight_shape"),
    ("packed, symmetric", "weight_g_idx", np.zeros(64, np.int32), "up_proj.weight_g_idx"),
    ("packed, symmetric", "weight_scale", np.ones((128, 1), np.float16), "up_proj.weight_scale"),
    (
        "packed, asymmetric",
        "weight_zero_point",
        np.zeros((15, 1), np.int32),
        r"up_proj.weight_zero_point.*\[16, 1\]",
    ),
    ("int8", "weight", np.zeros((128, 64), np.float32), "up_proj.weight.*float32.*int8"),
    ("int8", "weight_scale", np.ones(128, np.float32), "up_proj.weight_scale"),
    ("int8", "weight_scale", None, "up_proj.weight.*int8.*must be F32"),
    ("int8", "input_scale", np.ones(1, np.float32), "up_proj.input_scale"),
]


@pytest.mark.parametrize(("case", "part", "value", "named"), PARTS)
def test_tensors_that_contradict_the_settings_are_named(case, part, value, named, rng, tmp_path):
    settings, (group, zeros, num_bits), write, _ = CASES[case]
    matrices = random_matrices(rng, TINY, group, zeros, num_bits)
    parts = {module: write(matrix) for module, matrix in matrices.items()}
    parts[UP][part] = value
    if value is None:
        del parts[UP][part]
    folder = write_quantized(tmp_path, TINY, settings, parts)
    with pytest.raises(CheckpointError, match=named):
        HfCheckpoint(folder).read(f"{UP}.weight")


def test_layers_in_different_forms_are_refused(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(16), 4)
    parts = {name: awq_parts(matrix) for name, matrix in matrices.items() if name != UP}
    folder = write_quantized(tmp_path, TINY, AWQ, parts)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*layers\.0\.mlp\.up_proj"):
        HfCheckpoint(folder)


def test_integers_that_no_setting_explains_are_refused(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(16), 4)
    parts = {name: awq_parts(matrix) for name, matrix in matrices.items()}
    folder = write_quantized(tmp_path, TINY, None, parts)
    with pytest.raises(CheckpointError, match=r"qweight' of type int32.*F32, F16, BF16"):
        HfCheckpoint(folder)
