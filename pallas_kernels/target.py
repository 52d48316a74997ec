"""What we compile for: the facts of a chip that shape programs. Nothing here asks for devices.

Figures are the vendors' public ones, for one device as JAX counts them (a TPU v7x chip has two):
dense, without sparsity, at the form in which the chip is commonly rented (SXM for the GPUs).
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of device.

    Attributes:
        name: what the command line calls it, such as tpu:v6e.
        platform: JAX's name for the platform ("cpu", "gpu", "tpu").
        page_size: cached tokens in one page.
        holds_bfloat16_as_bits: whether large bfloat16 arrays live as uint16 words. XLA's CPU
            backend has no bfloat16 arithmetic: it widens a whole array before it slices, gathers
            or scatters one row of it, while it moves integers as they are.
        pads_rows_to: the fewest rows of a matrix product. With one row XLA's CPU backend leaves
            its matrix library for a naive loop.
        packs_cache: whether the cache's rows are laid out in whole vectors of 128, see
            `PagedCache`.
        multiplies_int8: whether its matrix unit multiplies int8 with int8.
        multiplies_fp8: whether its matrix unit multiplies float8_e4m3fn with float8_e4m3fn.
        flops: bfloat16 operations a second; None where it is not one chip.
        flops_8bit: 8-bit operations a second.
        hbm_bytes: device memory.
        hbm_bytes_per_s: its bandwidth.
        vmem_bytes: of a TPU, on-chip memory that kernels address; of a GPU, shared memory of a
            multiprocessor.
        smem_bytes: of a TPU, memory of its scalar unit, where kernels look page ids up.
        multiprocessors: of a GPU.
        l2_bytes: of a GPU, its second-level cache.
        clock_hz: of a GPU, the fastest clock of its multiprocessors.
        compute_capability: of a GPU, what its instructions are versioned by.
        instructions: of a CPU, the instruction set of the bodies in C++ that programs call, see
            `pallas_kernels/cpu`; empty where XLA's operations serve alone.
        topology: what a compiler without the device is told to compile for.
        device_kinds: what JAX calls its devices.
    """

    name: str
    platform: str
    page_size: int
    holds_bfloat16_as_bits: bool = False
    pads_rows_to: int = 1
    packs_cache: bool = False
    multiplies_int8: bool = False
    multiplies_fp8: bool = False
    flops: float | None = None
    flops_8bit: float | None = None
    hbm_bytes: int | None = None
    hbm_bytes_per_s: float | None = None
    vmem_bytes: int | None = None
    smem_bytes: int | None = None
    multiprocessors: int | None = None
    l2_bytes: int | None = None
    clock_hz: float | None = None
    compute_capability: str = ""
    instructions: str = ""
    topology: str = ""
    device_kinds: tuple[str, ...] = ()

    def cache_row(self, head_width: int) -> tuple[int, int]:
        """Returns R and W of the cache's rows, see `PagedCache`."""
        if not self.packs_cache:
            return 2, head_width
        return (1, 128) if head_width <= 64 else (2, -(-head_width // 128) * 128)


_GB, _MIB, _KIB = 10**9, 2**20, 2**10

CPU = Target(
    name="cpu",
    platform="cpu",
    page_size=16,
    holds_bfloat16_as_bits=True,
    pads_rows_to=2,
    multiplies_int8=True,
    device_kinds=("cpu",),
)


def cpu_target(instructions: str) -> Target:
    """Returns the CPU with bodies for an instruction set, or without any where it is empty."""
    return replace(CPU, instructions=instructions, pads_rows_to=1) if instructions else CPU


GPU = Target(name="gpu", platform="gpu", page_size=32, multiplies_int8=True)
V5E = Target(
    name="tpu:v5e",
    platform="tpu",
    page_size=128,
    packs_cache=True,
    multiplies_int8=True,
    flops=197e12,
    flops_8bit=394e12,
    hbm_bytes=16 * _GB,
    hbm_bytes_per_s=0.82e12,
    vmem_bytes=128 * _MIB,
    smem_bytes=_MIB,
    topology="v5e:2x2",
    device_kinds=("TPU v5 lite", "TPU v5e"),
)
V5P = Target(
    name="tpu:v5p",
    platform="tpu",
    page_size=128,
    packs_cache=True,
    multiplies_int8=True,
    flops=459e12,
    flops_8bit=918e12,
    hbm_bytes=95 * _GB,
    hbm_bytes_per_s=2.77e12,
    vmem_bytes=64 * _MIB,
    smem_bytes=_MIB,
    topology="v5p:2x2x1",
    device_kinds=("TPU v5", "TPU v5p"),
)
V6E = Target(
    name="tpu:v6e",
    platform="tpu",
    page_size=128,
    packs_cache=True,
    multiplies_int8=True,
    flops=918e12,
    flops_8bit=1836e12,
    hbm_bytes=32 * _GB,
    hbm_bytes_per_s=1.64e12,
    vmem_bytes=128 * _MIB,
    smem_bytes=_MIB,
    topology="v6e:2x2",
    device_kinds=("TPU v6 lite", "TPU v6e"),
)
V7X = Target(
    name="tpu:v7x",
    platform="tpu",
    page_size=128,
    packs_cache=True,
    multiplies_fp8=True,
    flops=1153.5e12,
    flops_8bit=2307e12,
    hbm_bytes=96 * _GB,
    hbm_bytes_per_s=3.7e12,
    vmem_bytes=64 * _MIB,
    smem_bytes=_MIB,
    topology="tpu7x:2x2x1",
    device_kinds=("TPU7x",),
)
H100 = Target(
    name="gpu:h100",
    platform="gpu",
    page_size=32,
    multiplies_int8=True,
    multiplies_fp8=True,
    flops=989e12,
    flops_8bit=1979e12,
    hbm_bytes=80 * _GB,
    hbm_bytes_per_s=3.35e12,
    vmem_bytes=228 * _KIB,
    multiprocessors=132,
    l2_bytes=50 * _MIB,
    clock_hz=1.98e9,
    compute_capability="9.0",
    topology="h100",
    device_kinds=("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
)
H200 = Target(
    name="gpu:h200",
    platform="gpu",
    page_size=32,
    multiplies_int8=True,
    multiplies_fp8=True,
    flops=989e12,
    flops_8bit=1979e12,
    hbm_bytes=141 * _GB,
    hbm_bytes_per_s=4.8e12,
    vmem_bytes=228 * _KIB,
    multiprocessors=132,
    l2_bytes=50 * _MIB,
    clock_hz=1.98e9,
    compute_capability="9.0",
    topology="h200",
    device_kinds=("NVIDIA H200",),
)
B200 = Target(
    name="gpu:b200",
    platform="gpu",
    page_size=32,
    multiplies_int8=True,
    multiplies_fp8=True,
    flops=2250e12,
    flops_8bit=4500e12,
    hbm_bytes=180 * _GB,
    hbm_bytes_per_s=8e12,
    vmem_bytes=228 * _KIB,
    multiprocessors=148,
    l2_bytes=126 * _MIB,
    clock_hz=1.965e9,
    compute_capability="10.0",
    topology="b200",
    device_kinds=("NVIDIA B200",),
)

TARGETS = {t.name: t for t in (CPU, GPU, V5E, V5P, V6E, V7X, H100, H200, B200)}


def find_target(name: str) -> Target:
    """Returns the target of this name; a chip's own name, such as v6e, will do.

    Raises ValueError for a name of none.
    """
    for target in TARGETS.values():
        if name in (target.name, target.name.partition(":")[2]):
            return target
    raise ValueError(f"got the target {name!r}; known are {', '.join(TARGETS)}")


def target_of(platform: str, device_kind: str) -> Target:
    """Returns the target of a device that calls itself so.

    A GPU of another kind is "gpu", without figures. Raises NotImplementedError for others.
    """
    for target in TARGETS.values():
        if target.platform == platform and device_kind in target.device_kinds:
            return target
    if platform in ("cpu", "gpu"):
        return CPU if platform == "cpu" else GPU
    raise NotImplementedError(
        f"got a device {device_kind!r} of platform {platform!r}; known are {', '.join(TARGETS)}"
    )
