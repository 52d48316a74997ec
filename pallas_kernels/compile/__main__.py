"""The command `python -m pallasite.pallas_kernels.compile module:function --target tpu:v6e`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallasite.pallas_kernels.compile import CompileError, Process, compile_for
from pallasite.pallas_kernels.compile.text import readable


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report of a case; exits with 1, after the compiler's message, where it fails."""
    parser = argparse.ArgumentParser(
        prog="python -m pallasite.pallas_kernels.compile",
        description="Compiles a case for a device that is not there, and tells what it needs.",
    )
    parser.add_argument("function", help="module:function, which returns a Case")
    parser.add_argument("--target", required=True, help="such as tpu:v6e or gpu:h100")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the function is called with; a value that is no JSON is text",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--analyze",
        dest="mode",
        action="store_const",
        const="analyze",
        default="compile",
        help="tell of a TPU's kernels their regions, of a GPU's their registers",
    )
    mode.add_argument(
        "--lower",
        dest="mode",
        action="store_const",
        const="lower",
        help="do not compile; for a GPU no compiler need be installed",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="leave the compiler's dumps there; it must be empty or missing",
    )
    given = parser.parse_args(arguments)
    try:
        options = dict(_option(text) for text in given.option)
        report = compile_for(
            given.function, given.target, options, given.mode, process=Process(keep=given.keep)
        )
    except (CompileError, ValueError) as error:
        sys.exit(f"pallasite: {error}")
    print(report.to_json() if given.json else readable(report))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"got the option {text!r}; it must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    main()
