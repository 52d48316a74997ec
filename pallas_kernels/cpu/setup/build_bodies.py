"""Builds the CPU's bodies with the package; setuptools calls it, nothing at run time does.

Every file is compiled with the same flags: which instructions a body may use is said in its source,
so that one library has the bodies for all processors of a kind. Without a compiler, or with one
that fails, the package is built all the same, and XLA's own operations serve.
"""

from pathlib import Path

import jax
from setuptools import Extension
from setuptools.command.build_ext import build_ext

LIBRARY_SUFFIX = ".library"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-pthread"]


class BuildBodies(build_ext):
    """setuptools' build_ext, with the headers of XLA's FFI and flags for C++17."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles the bodies of the processor that is built for."""
        ext.include_dirs.append(jax.ffi.include_dir())
        ext.extra_compile_args = FLAGS
        ext.extra_link_args = ["-pthread"]
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Returns none: the library is loaded by its path, not imported."""
        return []

    def get_ext_filename(self, fullname: str) -> str:
        """Returns a name that Python does not take for a module: the library is none.

        It serves any version of it, and needs none of its headers.
        """
        return str(Path(*fullname.split("."))) + LIBRARY_SUFFIX
