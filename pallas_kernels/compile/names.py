"""Which Python functions are the bodies of a program's loops and branches, and where they are."""

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax

from pallasite.pallas_kernels.compile.llo import Place, SourceNames

_JAX = os.path.dirname(jax.__file__) + os.sep
_OPS = os.path.join(_JAX, "experimental", "pallas", "ops", "")
"""Kernels that come with JAX."""
NO_NAMES = SourceNames(bodies=lambda place, kind: (), function=lambda place: None)
"""For what XLA has made of itself."""
_KINDS = {"scan": "loop", "while": "loop", "cond": "branch"}


def source_names(jaxpr: Any) -> SourceNames:
    """Returns the names of a traced function's parts, by the lines that its loops are made on."""
    bodies: dict[tuple[Place, str], dict[str, None]] = {}
    for equation in _equations(jaxpr):
        kind = _KINDS.get(equation.primitive.name)
        place = _place(equation) if kind else None
        if kind and place:
            of_place = bodies.setdefault((place, kind), {})
            of_place.update(dict.fromkeys(_body_names(equation)))
    return SourceNames(
        bodies=lambda place, kind: tuple(bodies.get((place, kind), ())), function=_function
    )


def _equations(value: Any) -> Iterator[Any]:
    """Yields all equations in a jaxpr, a parameter of one or a collection of such."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _equations(item)
    inner = getattr(value, "jaxpr", value)
    for equation in getattr(inner, "eqns", ()):
        yield equation
        for parameter in equation.params.values():
            yield from _equations(parameter)


def _place(equation: Any) -> Place | None:
    """Returns the innermost line outside JAX that made the equation."""
    frames = _frames_around(equation)
    return Place(frames[-1].file_name, frames[-1].line_num) if frames else None


def _body_names(equation: Any) -> list[str]:
    params = equation.params
    bodies = params.get("branches") or [params.get("body_jaxpr") or params.get("jaxpr")]
    return [name for body in bodies if (name := _body_name(equation, body))]


def _body_name(equation: Any, body: Any) -> str | None:
    """Returns the name of a body's function; None where JAX made the body alone."""
    info = getattr(body, "jaxpr", body).debug_info
    if not _is_library(info.func_src_info.partition(" at ")[2].rpartition(":")[0]):
        return info.func_name
    # JAX has wrapped a function, as `pl.loop` does. It is the first that is called in the body.
    around = [(frame.function_name, frame.line_num) for frame in _frames_around(equation)]
    for inner in _equations(body):
        frames = _frames_around(inner)
        called = [(frame.function_name, frame.line_num) for frame in frames]
        if called[: len(around)] == around:
            called = called[len(around) :]
        if called:
            return called[0][0].rpartition(".")[2]
    return None


def _frames_around(equation: Any) -> list[Any]:
    """Returns the frames outside JAX that the equation was made in, outermost first."""
    traceback = equation.source_info.traceback
    frames = traceback.frames if traceback else ()
    return [frame for frame in reversed(frames) if not _is_library(frame.file_name)]


def _is_library(file: str) -> bool:
    return file.startswith(_JAX) and not file.startswith(_OPS)


def _function(place: Place) -> str | None:
    functions = _functions(place.file)
    within = [
        (stop - start, name) for start, stop, name in functions if start <= place.line <= stop
    ]
    return min(within)[1] if within else None


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """Returns first line, last line and name, names around it before its own, of each function."""
    try:
        tree = ast.parse(Path(file).read_text())
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{outer}.{child.name}" if outer else child.name
                if not isinstance(child, ast.ClassDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
            visit(child, name)

    visit(tree, "")
    return found


def kernel_names(jaxpr: Any) -> list[str]:
    """Returns the names of the Pallas calls of a traced function, in order."""
    return [e.params["name"] for e in _equations(jaxpr) if e.primitive.name == "pallas_call"]
