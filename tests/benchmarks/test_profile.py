"""What the profile makes of a program's text and of the profiler's times."""

import pytest

from benchmarks.profile import Operation, _rows, operations

HLO = """
HloModule step
  %values = u8[30,96,18,4,16,4]{5,4,3,2,1,0} parameter(0)
  %scales = f16[30,96,18,16]{3,2,1,0} parameter(1)
  %head = u8[3072,18,8,16,4]{4,3,2,1,0} parameter(2)
  %x = f32[1,576]{1,0} parameter(3)
  %layer = s32[] parameter(4)
  %ffi_call.7 = f32[1,1536]{1,0} custom-call(%x, %layer, %values, %scales, %scales), \
custom_call_target="pallasite_multiply", metadata={op_name="jit(step)/while/body/ffn/ffi_call"}
  ROOT %ffi_call.9 = f32[1,49152]{1,0} custom-call(%x, %layer, %head), \
custom_call_target="pallasite_multiply", metadata={op_name="jit(step)/unembed/ffi_call"}
""".replace("\\\n", "")


def test_a_product_reads_one_layers_matrix():
    found = operations(HLO, 30)
    layer = 96 * 18 * 4 * 16 * 4 + 2 * 96 * 18 * 16 * 2
    assert found["ffi_call.7"] == Operation("jit(step)/while/body/ffn/ffi_call", layer)
    assert found["ffi_call.9"].matrix_bytes == 3072 * 18 * 8 * 16 * 4
    assert found["x"] == Operation("", 0)


def test_rows_are_of_a_step_and_the_longest_first():
    spent = {
        "ffi_call.9": (0.004, 2),
        "ffi_call.7": (0.006, 60),
        "while.3": (1.0, 2),
        "something else": (5.0, 1),
    }
    known = operations(HLO, 30) | {"while.3": Operation("jit(step)/while", 0)}
    first, second = _rows(spent, known, num_steps=2)
    assert (first["instruction"], second["instruction"]) == ("ffi_call.7", "ffi_call.9")
    assert first["operation"] == "jit(step)/ffn/ffi_call"
    assert first["ms_per_step"] == pytest.approx(3.0)
    assert first["calls_per_step"] == 30
    assert first["us_per_call"] == pytest.approx(100.0)
    assert first["bytes_per_s"] == pytest.approx(first["matrix_bytes"] / 100e-6)
