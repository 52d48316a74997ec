"""Builds the CPU's bodies with the package; setuptools calls it, nothing at run time does.

Every file is compiled with the same flags: which instructions a body may use is said in its source,
so that one library has the bodies for all processors of a kind. Without a compiler, or with one
that fails, the package is built all the same, and XLA's own operations serve.

An editable install keeps the library that lies in the sources, where it loads here and is newer
than all that it is made of: installing again, with other extras, compiles nothing.
"""

import ctypes
import shutil
from pathlib import Path

import jax
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

LIBRARY_SUFFIX = ".library"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-pthread"]


class BuildBodies(build_ext):
    """setuptools' build_ext, with the headers of XLA's FFI and flags for C++17."""

    def build_extension(self, ext: Extension) -> None:
        """Compiles the bodies of the processor that is built for."""
        ext.include_dirs.append(jax.ffi.include_dir())
        ext.extra_compile_args = FLAGS
        ext.extra_link_args = ["-pthread"]
        ext.depends.append(__file__)
        if self.editable_mode:
            self._offer_built(ext)
        super().build_extension(ext)

    def _offer_built(self, ext: Extension) -> None:
        """Puts the sources' own library where it would be built, so that setuptools finds it there.

        One that is too old, or another processor's, goes: should the compiler fail, it must not be
        taken for what these sources make.
        """
        package = ext.name.rpartition(".")[0]
        folder = Path(self.get_finalized_command("build_py").get_package_dir(package))
        own = folder / Path(self.get_ext_filename(ext.name)).name
        if newer_group([*ext.sources, *ext.depends], own, "newer") or not _loads(own):
            own.unlink(missing_ok=True)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(own, target)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Returns none: the library is loaded by its path, not imported."""
        return []

    def get_ext_filename(self, fullname: str) -> str:
        """Returns a name that Python does not take for a module: the library is none.

        It serves any version of it, and needs none of its headers.
        """
        return str(Path(*fullname.split("."))) + LIBRARY_SUFFIX


def _loads(library: Path) -> bool:
    """Returns whether a library is one for this processor and system."""
    try:
        ctypes.CDLL(str(library.resolve()))
    except OSError:
        return False
    return True
