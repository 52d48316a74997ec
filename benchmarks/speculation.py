"""What speculation gains and costs: the same requests with and without it, in turns.

Requests whose answers repeat their prompts, and ones whose answers do not; alone and several at
once. Answers are the same either way, but for ties of rounding, so that only their times differ.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# So that the file can be run by its path, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import report
from benchmarks.options import benchmark_parser, engine_config, run, say
from benchmarks.processes import timed_generate
from benchmarks.speculation_prompts import FREE, REPETITIVE
from pallasite.engine.config import DEFAULT_SPECULATE_TOKENS
from pallasite.engine.engine import Engine
from pallasite.engine.request import Request, SamplingParams
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.flags import TEXT, WHOLE
from pallasite.server.tokenizer import load_tokenizer

SIZES = (1, 8)
WORKLOADS = {
    "repetitive, greedy": (REPETITIVE, 0.0),
    "free, greedy": (FREE, 0.0),
    "free, temperature 1": (FREE, 1.0),
}


def main() -> None:
    """Measures and prints. Raises ConfigError where it cannot."""
    args = _arguments()
    if min(args.rounds, args.output_len) < 1:
        raise ConfigError(
            "got a number below 1 of rounds or tokens; it must be 1 or more; raise it"
        )
    plain = engine_config(args)
    drafting = replace(plain, speculate="ngram", speculate_tokens=args.speculate_tokens)
    with (
        Engine.load(args.model, plain, say) as without,
        Engine.load(args.model, drafting, say) as w,
    ):
        result: dict[str, Any] = {
            "model_id": args.model,
            "weights": plain.weights,
            "output_len": args.output_len,
            "speculate_tokens": drafting.num_drafts,
            "loads": {
                f"{name}, {size} at once": _compare(without, w, requests, size, args.rounds)
                for name, requests in _workloads(args.model, args.output_len, w).items()
                for size in SIZES
                if args.only in f"{name}, {size} at once"
            },
            "compilations": w.metrics.compilations,
            "misses": w.metrics.misses,
        }
    _show(result)
    if args.output is not None:
        report.write_json(args.output, result)


def _workloads(model: str, output_len: int, engine: Engine) -> dict[str, list[Request]]:
    """Returns the chats of each workload, those that fit the context, as requests."""
    tokenizer = load_tokenizer(locate(model))
    if tokenizer.chat_template is None:
        raise ConfigError(f"got {model!r}, which has no chat template; it must have one; change it")
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    workloads: dict[str, list[Request]] = {}
    for name, (prompts, temperature) in WORKLOADS.items():
        requests = [
            Request(
                prompt_ids=tuple(template.encode([{"role": "user", "content": prompt}])),
                params=SamplingParams(max_tokens=output_len, temperature=temperature, seed=seed),
            )
            for seed, prompt in enumerate(prompts)
        ]
        most = engine.max_context_len - output_len
        workloads[name] = [r for r in requests if len(r.prompt_ids) <= most]
        if left_out := len(requests) - len(workloads[name]):
            say(f"left out {left_out} of {name}: a context has {engine.max_context_len} tokens")
    return workloads


def _compare(
    without: Engine, drafting: Engine, requests: Sequence[Request], size: int, rounds: int
) -> dict[str, Any]:
    """Runs requests in groups of `size` on both engines in turns, after one group on each."""
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    metrics = drafting.metrics
    times: dict[bool, list[float]] = {False: [], True: []}
    cpu_times: dict[bool, list[float]] = {False: [], True: []}
    for engine in (without, drafting):
        timed_generate(engine, groups[0])
    before = (metrics.num_drafts, metrics.draft_tokens, metrics.accepted_tokens)
    num_tokens = 0
    for number in range(1, rounds + 1):
        say(f"{len(groups)} times {size} requests, round {number} of {rounds}")
        for engine, own in ((without, times[False]), (drafting, times[True])):
            cpu_start_s = time.process_time()
            runs = [timed_generate(engine, group) for group in groups]
            cpu_times[engine is drafting].append(time.process_time() - cpu_start_s)
            own.append(sum(run.duration_s for run in runs))
            num_tokens = sum(run.num_output_tokens for run in runs)
    after = (metrics.num_drafts, metrics.draft_tokens, metrics.accepted_tokens)
    num_drafts, draft_tokens, accepted_tokens = (b - a for a, b in zip(before, after, strict=True))
    plain_s, drafting_s = (report.spread(times[is_drafting]) for is_drafting in (False, True))
    plain_cpu_s, drafting_cpu_s = (report.spread(cpu_times[key]) for key in (False, True))
    return {
        "output_tokens": num_tokens,
        "without_cpu_s": plain_cpu_s,
        "with_cpu_s": drafting_cpu_s,
        "cpu_speed_up": plain_cpu_s["median"] / drafting_cpu_s["median"],
        "without_s": plain_s,
        "with_s": drafting_s,
        "speed_up": plain_s["median"] / drafting_s["median"],
        "num_drafts": num_drafts,
        "draft_tokens": draft_tokens,
        "accepted_tokens": accepted_tokens,
        "acceptance": accepted_tokens / max(1, draft_tokens),
        "mean_accepted_len": 1 + accepted_tokens / max(1, num_drafts),
    }


def _show(result: dict[str, Any]) -> None:
    rows = [
        [
            name,
            load["output_tokens"] / load["without_s"]["median"],
            load["output_tokens"] / load["with_s"]["median"],
            load["speed_up"],
            load["cpu_speed_up"],
            load["acceptance"],
            load["mean_accepted_len"],
        ]
        for name, load in result["loads"].items()
    ]
    headers = ["", "tokens/s", "speculating", "speed-up", "of CPU time", "acceptance"]
    headers += ["tokens a step with a draft"]
    title = f"with up to {result['speculate_tokens']} drafted tokens a step (medians)"
    print(report.table(title, headers, rows))
    print(f"\ncompiled since the start: {result['compilations']}, misses: {result['misses']}")


def _arguments() -> argparse.Namespace:
    parser = benchmark_parser("What speculation gains and costs.")
    for name, default, text in (
        ("--speculate-tokens", DEFAULT_SPECULATE_TOKENS, "tokens drafted in a step at most"),
        ("--rounds", 3, "of each load, with and without"),
        ("--output-len", 64, "tokens of a completion at most"),
    ):
        parser.add_argument(
            name, type=WHOLE, metavar="N", default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--only",
        type=TEXT,
        metavar="TEXT",
        default="",
        help="loads whose names have this in them, as 'free' or '8 at once' (default: all)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main))
