"""Pallasite against other engines on this CPU: the same file, prompts and token counts, in turns.

    make peers
    python -m benchmarks.compare --output cpu.json --plot docs/cpu.png --document docs/cpu.md

Every engine runs in a process and an environment of its own and stays loaded; one computes at a
time. What cannot run is told with its reason. docs/benchmarks.md tells how it measures.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compare_page, report
from benchmarks.compare_result import Result, joined, read, with_origin
from benchmarks.compare_run import POINT_NAMES, Comparison
from benchmarks.compare_turns import Contender, Terms
from benchmarks.kernel_page import check_page, fill_in
from benchmarks.options import benchmark_parser, engine_config, run, vocab_size
from benchmarks.peers.catalogue import BUILD, OURS, PEERS, ours
from pallasite.engine.config import EngineConfig
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.server.flags import ENGINE_FLAGS, FILE, WHOLE, shown_flags

SIZED = ("max_requests", "max_context_len", "num_pages", "cache_tokens")
"""Fields of EngineConfig that the points give, to every engine alike."""


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    config = _own_config(args)
    engines = contenders(args.peer)
    names = _points(args.points)
    if args.rounds < 1:
        raise ConfigError(f"got --rounds {args.rounds}; it must be at least 1; raise it")
    if args.plot is not None:
        report.check_plot()
    if args.document is not None:
        check_page(args.document, compare_page.NAMES)
    earlier = None if args.add_to is None else read(args.add_to)
    model = locate(args.model)
    if model.suffix != ".gguf":
        raise ConfigError(
            f"got {args.model!r}, which is no GGUF file; peers read nothing else; name one"
        )
    comparison = Comparison(
        ours=OURS,
        model=model,
        options=[*shown_flags(config, ENGINE_FLAGS), "--compile-cache", str(config.compile_cache)],
        folder=BUILD,
        terms=Terms(
            num_rounds=args.rounds,
            vocab_size=vocab_size(args.model),
            seed=args.seed,
            lock=args.lock,
        ),
    )
    result = with_origin(
        report.provenance() | {"model_id": args.model} | comparison.run(engines, names)
    )
    if earlier is not None:
        result = joined(earlier, result, POINT_NAMES)
    show(result)
    if args.output is not None:
        report.write_json(args.output, result)
    if args.plot is not None:
        compare_page.draw(args.plot, result)
    if args.document is not None:
        fill_in(args.document, compare_page.tables(result))


def contenders(names: Sequence[str] | None, build: Path = BUILD) -> list[Contender]:
    """Returns ours, and the peers of these names; None takes all, even those not installed.

    Raises ConfigError for a name that is unknown, or whose engine is not installed.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names or ():
        if name not in known:
            raise ConfigError(
                f"got --peer {name!r}; allowed are {', '.join(known)}; check the spelling"
            )
        if reason := known[name].state(build)["reason"]:
            raise ConfigError(
                f"got --peer {name!r}, which is not installed ({reason}); an engine that is asked"
                " for by name must be; run `make peers`, or leave --peer out to have it reported"
            )
    found = [Contender(OURS, ours())]
    for peer in PEERS:
        if names is None or peer.name in names:
            reason = peer.state(build)["reason"]
            program = None if reason else peer.program(build)
            found.append(Contender(peer.name, program, reason and f"not installed: {reason}"))
    return found


def show(result: Result) -> None:
    """Prints the figures, and why some are not there."""
    for table in compare_page.tables(result):
        if table.name in ("compare figures", "compare reasons"):
            print(report.table(table.title, table.headers, table.rows), end="\n\n")


def _points(names: Sequence[str] | None) -> Sequence[str]:
    for name in names or ():
        if name not in POINT_NAMES:
            raise ConfigError(
                f"got --points {name!r}; allowed are {', '.join(POINT_NAMES)}; check the spelling"
            )
    return names or POINT_NAMES


def _own_config(args: argparse.Namespace) -> EngineConfig:
    config = engine_config(args)
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    for name in SIZED:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"got --{name.replace('_', '-')}, which the points give to every engine alike;"
                " leave it out"
            )
    return config


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("Pallasite and other engines on this CPU, in turns.")
    parser.add_argument(
        "--peer",
        action="append",
        metavar="NAME",
        help=f"compare with this one; again for more (default: {', '.join(p.name for p in PEERS)})",
    )
    parser.add_argument(
        "--points",
        nargs="+",
        metavar="POINT",
        help=f"measure these (default: {' '.join(POINT_NAMES)})",
    )
    parser.add_argument(
        "--rounds", type=WHOLE, default=5, metavar="N", help="runs of each (default: 5)"
    )
    parser.add_argument(
        "--seed", type=WHOLE, default=0, metavar="N", help="of the random prompts (default: 0)"
    )
    parser.add_argument(
        "--plot", type=FILE, metavar="FILE", help="draw the medians as a PNG (default: do not)"
    )
    parser.add_argument(
        "--document",
        type=FILE,
        metavar="FILE",
        help="fill in the tables of a page (default: do not)",
    )
    parser.add_argument(
        "--add-to",
        type=FILE,
        metavar="FILE",
        help="take from this earlier result the points that are not measured now (default: none)",
    )
    parser.add_argument(
        "--lock",
        type=FILE,
        metavar="FILE",
        help="hold this file's lock while an engine is measured, so that benchmarks take turns on a"
        " machine (default: hold none)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
