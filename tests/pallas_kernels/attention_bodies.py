"""The bodies of the paged attention op, each with the settings that it is tested with.

The reference is always there. The others are from when the op names a body for their platform. A
kernel runs in an interpreter, on the CPU: a plain one for larger shapes; for TPUs also one that
runs each copy only when it is waited for, fills fresh memory with NaN and looks for races, for
shapes so small that a request is a few blocks. Where tests run on an accelerator
(`JAX_PLATFORMS=cuda`), its body runs there as it is compiled, too.
"""

from dataclasses import replace

import jax
from jax.experimental.pallas import tpu as pltpu

from pallasite.pallas_kernels import cpu
from pallasite.pallas_kernels import paged_attention as package
from pallasite.pallas_kernels.paged_attention import paged_attention, reference
from pallasite.pallas_kernels.target import CPU, H100, V6E, V7X, cpu_target
from tests.pallas_kernels.attention_cases import BFLOAT16, BITS, FLOAT32, FP8, INT8, Body, Setting

REFERENCE = Body(
    name="reference",
    op=paged_attention,
    target=CPU,
    is_exact=True,
    num_examples=20,
    settings=(
        Setting(T=150, K=1, G=1, H=16, page=16, held_as=FLOAT32),
        Setting(T=150, K=3, G=3, H=64, page=16, held_as=BITS, given_as=BFLOAT16, has_sinks=True),
        Setting(T=150, K=1, G=4, H=64, page=4, held_as=FLOAT32, windows=(37, 74)),
        Setting(T=30, K=3, G=1, H=16, page=32, held_as=BITS, windows=(130, None), soft_cap=2.0),
        Setting(T=150, K=1, G=3, H=16, page=16, held_as=BFLOAT16, soft_cap=5.0, has_sinks=True),
        Setting(T=150, K=3, G=2, H=16, page=16, held_as=INT8),
        Setting(T=30, K=1, G=3, H=64, page=4, held_as=INT8, windows=(37, 74), has_sinks=True),
        Setting(T=70, K=3, G=2, H=128, page=16, held_as=FP8, given_as=BFLOAT16),
        Setting(T=70, K=1, G=8, H=256, page=32, held_as=FLOAT32, has_sinks=True),
        Setting(T=5, K=3, G=3, H=64, page=16, held_as=FLOAT32, windows=(20, 40)),
        Setting(T=5, K=1, G=3, H=16, page=16, held_as=BITS, has_sinks=True),
        Setting(T=5, K=3, G=2, H=64, page=16, held_as=INT8),
        Setting(T=5, K=1, G=2, H=128, page=16, held_as=FP8, soft_cap=3.0),
    ),
)

TPU_LAYOUT = Body(
    name="reference in a TPU's layout",
    op=reference.paged_attention,
    target=V6E,
    is_exact=True,
    num_examples=15,
    settings=(
        Setting(T=40, K=3, G=2, H=64, page=16, held_as=BFLOAT16, has_sinks=True),
        Setting(T=40, K=1, G=3, H=80, page=16, held_as=INT8, windows=(37, None)),
        Setting(T=40, K=1, G=2, H=16, page=32, held_as=FP8, given_as=BFLOAT16),
        Setting(T=5, K=3, G=1, H=64, page=16, held_as=INT8, has_sinks=True),
    ),
)

_TPU_LARGER = (
    Setting(T=200, K=3, G=4, H=128, page=128, held_as=BFLOAT16, given_as=BFLOAT16, max_len=1300),
    Setting(
        **{"T": 200, "K": 1, "G": 3, "H": 64, "page": 128, "held_as": BFLOAT16, "max_len": 1300},
        **{"given_as": BFLOAT16, "windows": (200, 700), "has_sinks": True},
    ),
    Setting(T=200, K=1, G=1, H=256, page=128, held_as=FLOAT32, max_len=1300, soft_cap=5.0),
    Setting(T=200, K=1, G=8, H=128, page=32, held_as=INT8, given_as=BFLOAT16, windows=(37, 150)),
    Setting(T=5, K=3, G=4, H=128, page=128, held_as=BFLOAT16, given_as=BFLOAT16, max_len=2500),
    Setting(T=5, K=3, G=2, H=64, page=128, held_as=INT8, max_len=1300, windows=(700, None)),
    Setting(T=5, K=1, G=5, H=80, page=32, held_as=FLOAT32, has_sinks=True),
)

_TPU_FP8 = (
    Setting(T=200, K=1, G=4, H=128, page=128, held_as=FP8, given_as=BFLOAT16, max_len=700),
    Setting(T=5, K=3, G=4, H=64, page=128, held_as=FP8, given_as=BFLOAT16, max_len=1300),
)

_TPU_TINY = (
    Setting(T=20, K=1, G=2, H=128, page=32, held_as=BFLOAT16, given_as=BFLOAT16, B=3, max_len=96),
    Setting(T=20, K=1, G=1, H=64, page=32, held_as=FLOAT32, B=3, max_len=96, windows=(20, None)),
    Setting(T=20, K=3, G=1, H=64, page=32, held_as=INT8, B=3, max_len=96),
    Setting(T=3, K=1, G=2, H=128, page=32, held_as=BFLOAT16, B=3, max_len=96, has_sinks=True),
    Setting(T=3, K=3, G=1, H=64, page=32, held_as=INT8, B=3, max_len=96),
)

_TPU = Body(
    name="TPU",
    op=paged_attention,
    target=V6E,
    interpret=True,
    num_examples=5,
    settings=_TPU_LARGER,
)

_TPU_BODIES = (
    _TPU,
    replace(_TPU, name="TPU v7x", target=V7X, settings=_TPU_FP8),
    replace(
        _TPU,
        name="TPU by copies",
        interpret=pltpu.InterpretParams(
            detect_races=True,
            dma_execution_mode="on_wait",
            uninitialized_memory="nan",
            out_of_bounds_reads="raise",
        ),
        num_examples=3,
        settings=_TPU_TINY,
    ),
)

_GPU = Body(
    name="GPU",
    op=paged_attention,
    target=H100,
    interpret=True,
    num_examples=5,
    settings=(
        Setting(T=150, K=3, G=4, H=64, page=32, held_as=BFLOAT16, given_as=BFLOAT16),
        Setting(
            **{"T": 150, "K": 1, "G": 3, "H": 128, "page": 32, "held_as": BFLOAT16},
            **{"given_as": BFLOAT16, "windows": (100, None), "has_sinks": True},
        ),
        Setting(T=150, K=1, G=1, H=256, page=32, held_as=FLOAT32, soft_cap=5.0),
        Setting(T=150, K=3, G=2, H=64, page=16, held_as=INT8, windows=(37, 74)),
        Setting(T=150, K=1, G=8, H=128, page=32, held_as=FP8, given_as=BFLOAT16),
        Setting(T=5, K=3, G=4, H=128, page=32, held_as=BFLOAT16, given_as=BFLOAT16, max_len=700),
        Setting(T=5, K=1, G=5, H=64, page=16, held_as=FLOAT32, windows=(100, None)),
        Setting(T=5, K=1, G=8, H=128, page=32, held_as=INT8, has_sinks=True),
        Setting(T=5, K=3, G=2, H=64, page=32, held_as=FP8, given_as=BFLOAT16, soft_cap=3.0),
    ),
)

_CPU = Body(
    name="CPU",
    op=paged_attention,
    target=CPU,
    num_examples=15,
    refuses_pages=True,
    settings=(
        Setting(T=150, K=1, G=1, H=16, page=16, held_as=FLOAT32),
        Setting(T=150, K=3, G=3, H=64, page=16, held_as=BITS, has_sinks=True, max_len=700),
        Setting(T=150, K=1, G=4, H=64, page=32, held_as=FLOAT32, windows=(37, 74)),
        Setting(T=30, K=3, G=1, H=16, page=32, held_as=BITS, windows=(130, None), soft_cap=2.0),
        Setting(T=150, K=3, G=2, H=80, page=16, held_as=INT8, given_as=BFLOAT16),
        Setting(T=70, K=1, G=8, H=256, page=16, held_as=BITS, given_as=BFLOAT16, has_sinks=True),
        Setting(T=5, K=1, G=3, H=64, page=16, held_as=BITS, max_len=2500, has_sinks=True),
        Setting(T=5, K=3, G=3, H=64, page=16, held_as=FLOAT32, windows=(300, 40), max_len=1300),
        Setting(T=5, K=3, G=2, H=128, page=16, held_as=INT8, soft_cap=3.0, windows=(700, None)),
        Setting(T=5, K=1, G=13, H=16, page=32, held_as=BITS),
    ),
)


def _all() -> list[Body]:
    bodies = [REFERENCE, TPU_LAYOUT]
    bodies += [
        replace(_CPU, name=f"CPU {name}", target=cpu_target(name))
        for name in cpu.INSTRUCTIONS
        if cpu.runs(name)
    ]
    by_platform = {"tpu": _TPU_BODIES, "gpu": (_GPU,)}
    for platform, interpreted in by_platform.items():
        if platform not in package._BODIES:
            continue
        if jax.default_backend() == platform:
            first = interpreted[0]
            bodies.append(replace(first, name=f"{first.name} as compiled", interpret=False))
        else:
            bodies.extend(interpreted)
    return bodies


BODIES = _all()
