"""The CPU's bodies in C++: where they are, whether they run here, and their registration with XLA.

They are built with the package where there is a compiler, see `setup/build_bodies.py`, for every
instruction set of the processor's kind; the best that it has is chosen when they are loaded. Where
they are not built, or nothing fits, XLA's own operations serve.
"""

import ctypes
from functools import cache
from pathlib import Path

import jax

MULTIPLY = "pallasite_multiply"
ATTEND = "pallasite_attend"
FIND_PEAKS = "pallasite_find_peaks"
CLEAR = "pallasite_clear"

_SYMBOLS = {
    MULTIPLY: "PallasiteMultiply",
    ATTEND: "PallasiteAttend",
    FIND_PEAKS: "PallasiteFindPeaks",
    CLEAR: "PallasiteClear",
}


INSTRUCTIONS = ("avx512-vnni", "avx512", "avx2", "neon")
"""All that there are bodies for, the better ones first."""


@cache
def best_instructions() -> str:
    """Returns the best of INSTRUCTIONS whose bodies run here; empty where none does.

    A program that calls them can be compiled, or loaded, after the first call of this.
    """
    library = _load()
    return "" if library is None else library.pallasite_instructions().decode()


def runs(instructions: str) -> bool:
    """Returns whether the bodies of an instruction set have been built and run here."""
    library = _load()
    return library is not None and bool(library.pallasite_runs(instructions.encode()))


def library_path() -> Path | None:
    """Returns where the bodies are, None where they have not been built."""
    path = Path(__file__).parent / "bodies.library"
    return path if path.is_file() else None


@cache
def _load() -> ctypes.CDLL | None:
    path = library_path()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.pallasite_instructions.restype = ctypes.c_char_p
    library.pallasite_runs.argtypes = [ctypes.c_char_p]
    library.pallasite_runs.restype = ctypes.c_bool
    for target, symbol in _SYMBOLS.items():
        if not hasattr(library, symbol):
            raise RuntimeError(
                f"got {path} without {symbol}; it was built from older sources; build it again:"
                " `pip install --editable .`"
            )
        handler = jax.ffi.pycapsule(getattr(library, symbol))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return library
