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
from tests.models.quantized_cases import (
    AWQ,
    CASES,
    GPTQ,
    UP,
    as_written,
    compressed,
    expected_values,
    weights,
)
from tests.models.quantized_files import (
    awq_parts,
    gptq_parts,
    packed_parts,
    random_codes,
    random_matrices,
    write_quantized,
)
from tests.models.running import mesh_of
from tests.tiny_checkpoints import TINY, random_tensors


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
    whole = weight.product()
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
