"""AWQ, GPTQ and compressed-tensors folders: read to the bit, and refused where they say otherwise.

The folders are written by quantized_files.py, which knows the formats and not the readers.
"""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from pallasite.models.checkpoint_hf import HfCheckpoint
from pallasite.models.errors import CheckpointError
from pallasite.models.forms import form_of, parse_form
from pallasite.models.loader import load_weights
from pallasite.models.quantize import QuantizedTensor
from pallasite.models.registry import make_model
from pallasite.models.weights import Matrix, declared_weights, placed, source_of
from pallasite.pallas_kernels.quantized_matmul import dequantize
from pallasite.pallas_kernels.target import CPU
from tests.models.quantized_files import (
    Codes,
    awq_parts,
    gptq_parts,
    packed_parts,
    random_codes,
    random_matrices,
    write_quantized,
)
from tests.models.running import mesh_of
from tests.tiny_checkpoints import TINY, random_tensors

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
UP = "model.layers.1.mlp.up_proj"


def weights(num_bits: int, group: int | None, **changes: object) -> dict[str, object]:
    stated = {"num_bits": num_bits, "type": "int", "symmetric": True, "dynamic": False}
    stated |= {"strategy": "channel"} if group is None else {"strategy": "group"}
    return stated | {"group_size": group} | changes


def compressed(
    storage: str, weights: dict[str, object], inputs: dict[str, object] | None = None
) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
GROUPS = TOKEN | {"strategy": "group", "group_size": 32}

# Settings; group, zeros and bits of the codes; how they are written; the form they are held in.
# "{in}" is the width of the matrix.
CASES = {
    "awq": (AWQ, (32, range(16), 4), awq_parts, "int4:32"),
    "awq groups of 64": (AWQ | {"group_size": 64}, (64, range(16), 4), awq_parts, "int4:64"),
    "gptq": (GPTQ, (32, range(1, 16), 4), gptq_parts, "int4:32"),
    "gptq whole rows": (
        GPTQ | {"group_size": -1, "desc_act": True},
        (None, range(8, 9), 4),
        gptq_parts,
        "int4:{in}",
    ),
    "gptq_v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        (32, range(16), 4),
        lambda matrix: gptq_parts(matrix, lowered=0),
        "int4:32",
    ),
    "gptq of 8 bits": (
        GPTQ | {"bits": 8},
        (32, range(128, 129), 8),
        lambda matrix: gptq_parts(matrix, num_bits=8),
        "int8:32",
    ),
    "gptq of 8 bits, whole rows": (
        GPTQ | {"bits": 8, "group_size": -1},
        (None, range(128, 129), 8),
        lambda matrix: gptq_parts(matrix, num_bits=8),
        "int8",
    ),
    "packed, symmetric": (
        compressed("pack-quantized", weights(4, 32)),
        (32, range(8, 9), 4),
        packed_parts,
        "int4:32",
    ),
    "packed, asymmetric": (
        compressed("pack-quantized", weights(4, 64, symmetric=False)),
        (64, range(16), 4),
        lambda matrix: packed_parts(matrix, has_zeros=True),
        "int4:64",
    ),
    "packed, whole rows": (
        compressed("pack-quantized", weights(4, None)),
        (None, range(8, 9), 4),
        packed_parts,
        "int4:{in}",
    ),
    "packed, 8 bits": (
        compressed("pack-quantized", weights(8, None)),
        (None, range(128, 129), 8),
        lambda matrix: packed_parts(matrix, num_bits=8),
        "int8",
    ),
    "int8": (
        compressed("int-quantized", weights(8, None)),
        (None, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "int8",
    ),
    "int8 groups": (
        compressed("int-quantized", weights(8, 32)),
        (32, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "int8:32",
    ),
    "w8a8": (
        compressed("int-quantized", weights(8, None), TOKEN),
        (None, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "w8a8",
    ),
    "w8a8 groups": (
        compressed("int-quantized", weights(8, 32), GROUPS),
        (32, range(128, 129), 8),
        lambda matrix: int8_parts(matrix),
        "w8a8:32",
    ),
}


def int8_parts(matrix: Codes) -> dict[str, np.ndarray]:
    return {
        "weight": (matrix.codes - 128).astype(np.int8),
        "weight_scale": matrix.scales.astype(ml_dtypes.bfloat16),
    }


def expected_values(matrix: Codes, form: str) -> np.ndarray:
    """The numbers that the codes are, and the scales as they were written."""
    return matrix.codes if form.startswith("int4") else matrix.codes - 128


def as_written(matrix: Codes, write) -> Codes:
    return (
        replace(matrix, scales=matrix.scales.astype(ml_dtypes.bfloat16).astype(np.float16))
        if ("weight" in write(matrix))
        else matrix
    )


@pytest.mark.parametrize("name", CASES)
class TestFormats:
    @pytest.fixture
    def case(self, name, rng, tmp_path):
        settings, (group, zeros, num_bits), write, form = CASES[name]
        matrices = random_matrices(rng, TINY, group, zeros, num_bits)
        parts = {module: write(matrix) for module, matrix in matrices.items()}
        return write_quantized(tmp_path, TINY, settings, parts), matrices, write, form

    def test_what_is_read_is_what_was_stored(self, case):
        folder, matrices, write, form = case
        checkpoint = HfCheckpoint(folder)
        plain = random_tensors(TINY, seed=3)
        assert dict(checkpoint.shapes) == {name: value.shape for name, value in plain.items()}
        for name in checkpoint.shapes:
            read, matrix = checkpoint.read(name), matrices.get(name.removesuffix(".weight"))
            if matrix is None:
                np.testing.assert_array_equal(read, plain[name])
                continue
            assert isinstance(read, QuantizedTensor)
            matrix = as_written(matrix, write)
            np.testing.assert_array_equal(read.values, expected_values(matrix, form))
            np.testing.assert_array_equal(read.scales, matrix.scales.astype(np.float32))
            # Scales of 16 bits make each product and each sum exact in f32: not one bit differs.
            np.testing.assert_array_equal(read.dequantize(), matrix.weight)
            assert read.scales.dtype == np.float32

    def test_the_rules_name_each_weight_and_nothing_else(self, case):
        folder, matrices, _, form = case
        checkpoint = HfCheckpoint(folder)
        for name, shape in checkpoint.shapes.items():
            module = name.removesuffix(".weight")
            pattern = module.replace(".0.", ".*.").replace(".1.", ".*.")
            expected = None
            if module in matrices:
                expected = parse_form(form.replace("{in}", str(shape[1])))
            assert form_of(pattern, checkpoint.config.stored_forms) == expected

    def test_a_model_holds_the_matrices_as_they_were_stored(self, case):
        folder, matrices, write, _ = case
        checkpoint = HfCheckpoint(folder)
        mesh = mesh_of()
        abstract = make_model(checkpoint.config, "f32", CPU)
        model = load_weights(placed(abstract, mesh), checkpoint, mesh)
        num_compared = 0
        for _, weight in declared_weights(model):
            names = source_of(weight).names(TINY.num_layers)
            if not isinstance(weight, Matrix) or not weight.form.is_quantized:
                assert not {name.removesuffix(".weight") for name in names} & set(matrices)
                continue
            for layer, name in enumerate(names):
                held = replace_leaves(weight, layer)
                matrix = as_written(matrices[name.removesuffix(".weight")], write)
                np.testing.assert_array_equal(np.asarray(dequantize(held)), matrix.weight)
                num_compared += 1
        assert num_compared == len(matrices) == 14


def replace_leaves(weight: Matrix, layer: int):
    whole = weight.quantized()
    minimums = None if whole.minimums is None else whole.minimums[layer]
    return replace(whole, values=whole.values[layer], scales=whole.scales[layer], minimums=minimums)


def test_fp8_weights_are_read_as_they_are(rng, tmp_path):
    """Every finite number of the type, and a scale a row."""
    finite = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    stored = finite[rng.integers(len(finite), size=(128, 64))].view(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(1e-3, 1e-2, (128, 1)).astype(np.float32)
    parts = {
        f"model.layers.{layer}.mlp.up_proj": {"weight": stored, "weight_scale": scales}
        for layer in range(2)
    }
    settings = compressed("float-quantized", weights(8, None, type="float"))
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, settings, parts))
    assert checkpoint.config.stored_forms == ((r"^model\.layers\.\*\.mlp\.up_proj$", "fp8"),)
    read = checkpoint.read(f"{UP}.weight")
    assert read.values.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(read.values.view(np.uint8), stored.view(np.uint8))
    np.testing.assert_array_equal(read.scales, scales)
    not_a_number = stored.copy()
    not_a_number.view(np.uint8)[5, 7] = 0xFF
    parts[UP]["weight"] = not_a_number
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, settings, parts))
    with pytest.raises(CheckpointError, match=r"got 1 values.*layers\.1\.mlp\.up_proj\.weight"):
        checkpoint.read(f"{UP}.weight")


def test_groups_of_modules_are_told_apart_by_their_targets(rng, tmp_path):
    """A name before a pattern before the class, whatever the order in the file."""
    matrices = random_matrices(rng, TINY, 32, range(8, 9), 4)
    parts = {name: packed_parts(matrix) for name, matrix in matrices.items()}
    for name in parts:
        if "mlp" in name:
            codes = random_codes(rng, matrices[name].codes.shape, 64, range(128, 129), 8)
            parts[name] = packed_parts(codes, num_bits=8)
    settings = compressed("pack-quantized", weights(4, 32))
    named = [name for name in parts if name.endswith("gate_proj")]
    for name in named:
        codes = random_codes(rng, matrices[name].codes.shape, 16, range(16))
        parts[name] = packed_parts(codes, has_zeros=True)
    settings["config_groups"] |= {
        "group_1": {"targets": ["re:.*mlp.*"], "weights": weights(8, 64)},
        "group_2": {"targets": named, "weights": weights(4, 16, symmetric=False)},
    }
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, settings, parts))
    forms = dict(checkpoint.config.stored_forms)
    assert forms[r"^model\.layers\.\*\.self_attn\.q_proj$"] == "int4:32"
    assert forms[r"^model\.layers\.\*\.mlp\.up_proj$"] == "int8:64"
    assert forms[r"^model\.layers\.\*\.mlp\.gate_proj$"] == "int4:16"
    for group in settings["config_groups"].values():
        group["targets"] = ["re:nothing"]
    with pytest.raises(CheckpointError, match=r"_proj.*no group of config_groups"):
        HfCheckpoint(write_quantized(tmp_path, TINY, settings, parts))


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


def test_biases_beside_quantized_matrices_are_tensors_of_their_own(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(16), 4)
    parts = {name: awq_parts(matrix) for name, matrix in matrices.items()}
    parts[UP]["bias"] = rng.normal(size=128).astype(np.float16)
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, AWQ, parts))
    assert checkpoint.shapes[f"{UP}.bias"] == (128,)
    np.testing.assert_array_equal(checkpoint.read(f"{UP}.bias"), parts[UP]["bias"])


def test_a_gptq_zero_below_what_the_format_can_write_is_refused(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(1, 16), 4)
    matrices[UP].zeros[3, 1] = 16  # written as 15, as 0 is
    parts = {name: gptq_parts(matrix) for name, matrix in matrices.items()}
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, GPTQ, parts))
    with pytest.raises(CheckpointError, match=r"up_proj\.qzeros.*for 0 or for 16.*gptq_v2"):
        checkpoint.read(f"{UP}.weight")


def test_zero_biases_that_gptq_adds_are_left_out(rng, tmp_path):
    matrices = random_matrices(rng, TINY, 32, range(1, 16), 4)
    parts = {name: gptq_parts(matrix) for name, matrix in matrices.items()}
    for name, matrix in matrices.items():
        parts[name]["bias"] = np.zeros(len(matrix.codes), np.float16)
    parts[UP]["bias"][7] = 1
    checkpoint = HfCheckpoint(write_quantized(tmp_path, TINY, GPTQ, parts))
    assert [name for name in checkpoint.shapes if name.endswith("bias")] == [f"{UP}.bias"]
