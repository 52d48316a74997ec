"""What the C library does with memory that was freed. Only glibc can be told.

Every run of a program on a CPU allocates its temporaries and frees them. Memory that goes back to
the system in between comes again as zeroed pages, one fault each, thousands a step.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h

KEPT_BYTES = 256 << 20
"""Freed memory at an arena's end that is kept."""

_LARGEST_THRESHOLD = 32 << 20  # the most that glibc takes
_PAD_BYTES = 64 << 20  # of addresses, not of memory: an arena that may grow so far is not dropped


def keep_freed_memory() -> None:
    """Has freed memory kept for the next allocation from here on."""
    mallopt = getattr(_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_TOP_PAD, _PAD_BYTES)


def return_freed_memory() -> None:
    """Gives freed memory back now, which is otherwise kept."""
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
