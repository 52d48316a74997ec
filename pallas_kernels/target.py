"""What we compile for: the facts of a platform that shape programs. Nothing asks for devices."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of device.

    Attributes:
        name: what the command line calls it.
        platform: XLA's name for the platform ("cpu", "gpu", "tpu").
        page_size: cached tokens in one page.
        holds_bfloat16_as_bits: whether large bfloat16 arrays live as uint16 words. XLA's CPU
            backend has no bfloat16 arithmetic: it widens a whole array before it slices, gathers
            or scatters one row of it, while it moves integers as they are.
        pads_rows_to: the fewest rows of a matrix product. With one row XLA's CPU backend leaves
            its matrix library for a naive loop.
    """

    name: str
    platform: str
    page_size: int
    holds_bfloat16_as_bits: bool = False
    pads_rows_to: int = 1


CPU = Target(name="cpu", platform="cpu", page_size=16, holds_bfloat16_as_bits=True, pads_rows_to=2)
GPU = Target(name="gpu", platform="gpu", page_size=32)
TPU = Target(name="tpu", platform="tpu", page_size=128)

TARGETS = {target.platform: target for target in (CPU, GPU, TPU)}
