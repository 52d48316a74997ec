"""What a program's instructions move, read off its text."""

import pytest

from pallasite.pallas_kernels.compile import compile_for
from pallasite.pallas_kernels.compile.traffic import instructions
from tests.pallas_kernels.compilers import needs_tpu_compiler

PROGRAM = """HloModule jit_f, is_scheduled=true

%same (input: s8[4,64,256]) -> s8[4,64,256] {
  %input = s8[4,64,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.1 = s8[4,64,256]{2,1,0:T(8,128)(4,1)} copy(%input)
}

%layer (p.0: s8[4,64,256], p.1: s32[]) -> s8[1,64,256] {
  %p.0 = s8[4,64,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %fusion.1 = s8[4,64,256]{2,1,0:T(8,128)(4,1)} fusion(%p.0), kind=kLoop, \
output_to_operand_aliasing={{}: (0, {})}, calls=%same
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice.1 = s8[1,64,256]{2,1,0:T(8,128)(4,1)} \
dynamic-slice(%fusion.1, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,256}
}

%row (p.2: f32[4,3], p.3: f32[1,3], p.4: s32[]) -> f32[4,3] {
  %p.2 = f32[4,3]{1,0:T(8,128)} parameter(0)
  %p.3 = f32[1,3]{1,0:T(8,128)} parameter(1)
  %p.4 = s32[]{:T(128)S(6)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %update = f32[4,3]{1,0:T(8,128)} dynamic-update-slice(%p.2, %p.3, %p.4, %zero.1)
}

%body (arg: (s32[], s8[4,64,256], f32[4,3], f32[1,3])) -> (s32[]) {
  %arg = (s32[]{:T(128)}, s8[4,64,256]{2,1,0:T(32,128)(4,1)}, f32[4,3]{1,0:T(8,128)}, /*index=3*/\
f32[1,3]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %stack = s8[4,64,256]{2,1,0:T(32,128)(4,1)} get-tuple-element(%arg), index=1
  %rows = f32[4,3]{1,0:T(8,128)} get-tuple-element(%arg), index=2
  %new = f32[1,3]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=3
  %take = s8[1,64,256]{2,1,0:T(8,128)(4,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%layer
  %put = f32[4,3]{1,0:T(8,128)} fusion(%rows, %new, %i), kind=kLoop, calls=%row, metadata={op="
a line of its own"}
  %call = f32[1,3]{1,0:T(8,128)S(1)} custom-call(%stack), custom_call_target="tpu_custom_call"
  ROOT %next = (s32[]{:T(128)}, s8[4,64,256]{2,1,0:T(32,128)(4,1)}, f32[4,3]{1,0:T(8,128)}, \
f32[1,3]{1,0:T(8,128)S(1)}) tuple(%i, %stack, %put, %call)
}

%test (arg.1: (s32[], s8[4,64,256], f32[4,3], f32[1,3])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %arg.1 = (s32[]{:T(128)}, s8[4,64,256]{2,1,0:T(32,128)(4,1)}, f32[4,3]{1,0:T(8,128)}, \
f32[1,3]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (w: s8[4,64,256], r: f32[4,3], n: f32[1,3]) -> f32[4,3] {
  %first = s32[]{:T(128)} constant(1)
  %w = s8[4,64,256]{2,1,0:T(32,128)(4,1)} parameter(0)
  %r = f32[4,3]{1,0:T(8,128)} parameter(1)
  %n = f32[1,3]{1,0:T(8,128)} parameter(2)
  %begin = (f32[1,3]{1,0:T(8,128)S(1)}, f32[1,3]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%n)
  %end = f32[1,3]{1,0:T(8,128)S(1)} copy-done(%begin)
  %start = (s32[]{:T(128)}, s8[4,64,256]{2,1,0:T(32,128)(4,1)}, f32[4,3]{1,0:T(8,128)}, \
f32[1,3]{1,0:T(8,128)S(1)}) tuple(%first, %w, %r, %end)
  %loop = (s32[]{:T(128)}, s8[4,64,256]{2,1,0:T(32,128)(4,1)}, f32[4,3]{1,0:T(8,128)}, \
f32[1,3]{1,0:T(8,128)S(1)}) while(%start), condition=%test, body=%body
  %rows.1 = f32[4,3]{1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %wide = f32[4,3]{1,0:T(8,128)} negate(%rows.1)
}
"""


def test_layers_of_a_stack_rows_of_an_array_and_whole_tiles():
    found = {i.name: i for i in instructions(PROGRAM)}
    assert list(found) == ["begin", "take", "put", "call", "wide"]
    moved = {n: (i.times, i.bytes_read, i.bytes_written) for n, i in found.items()}
    # From 1 up to 4. A layer is [64, 256] bytes; a tile of f32 is [8, 128].
    assert moved["take"] == (3, 64 * 256, 0)
    assert moved["put"] == (3, 0, 8 * 128 * 4)
    assert moved["call"] == (3, None, None)
    assert moved["begin"] == (1, 8 * 128 * 4, 0)
    assert moved["wide"] == (1, 8 * 128 * 4, 8 * 128 * 4)


def test_a_loop_of_unknown_count_is_an_error():
    unknown = PROGRAM.replace("%first = s32[]{:T(128)} constant(1)", "%first = s32[] parameter(3)")
    with pytest.raises(ValueError, match="got the loop loop, whose count the program does not say"):
        instructions(unknown)


@needs_tpu_compiler
@pytest.mark.parametrize("target", ["tpu:v5e", "tpu:v7x"])
def test_what_a_compiled_loop_moves(target):
    cases = "tests.pallas_kernels.compile_cases"
    report = compile_for(f"{cases}:layers", target, mode="analyze")
    own = [i for i in report.instructions if i.times == 5]
    assert sum(i.times for i in report.instructions) > 0
    # Of a layer's weights, and no more than a little beside.
    weights = 2048 * 2048
    assert weights <= sum(i.bytes_read for i in own) < 1.1 * weights
    assert sum(i.bytes_written for i in own) < 0.1 * weights
    # The matrix unit takes an instruction for no more than 8 rows of up to 256 inputs.
    product = max(own, key=lambda i: i.bytes_read)
    assert product.bundles > 100
