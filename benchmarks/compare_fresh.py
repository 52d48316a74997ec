"""What an engine takes to start and holds in memory, and how near its answers are to f32's.

The first two are of a process of its own, started for one request while the others wait.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.compare_points import Figure, Load, room_for
from benchmarks.compare_turns import Contender, family_of
from benchmarks.peers.process import PeerError, PeerProcess
from benchmarks.processes import Memory, memory_of
from pallasite.models.errors import ConfigError

FIRST = Load(num_requests=1, input_len=139, output_len=1)
"""The request whose token ends a start."""

ONE = Load(num_requests=1, input_len=128, output_len=128)
"""The request whose memory is told."""

SCORED = Load(num_requests=32, input_len=128, output_len=1)
"""Room for the texts that are scored; an engine may need many requests for one."""

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "parity" / "goldens" / "smollm2.npz"

START_FIGURES = (
    Figure(
        name="start",
        title="start to first token, 139 in",
        unit="s",
        is_more_better=False,
        definition="seconds from the start of a process until the first token of its first request;"
        " the files and each engine's own caches are warm from a start before",
    ),
    Figure(
        name="peak",
        title="memory, peak, 1 request",
        unit="MB",
        is_more_better=False,
        definition="VmHWM after that and a request of 128 in, 128 out, loaded with room for one"
        " request; a sum over the engine's processes",
    ),
    Figure(
        name="resident",
        title="memory, after, 1 request",
        unit="MB",
        is_more_better=False,
        definition="PSS at the same moment",
    ),
)

QUALITY_FIGURES = (
    Figure(
        name="difference",
        title="mean difference of log p",
        unit="nats",
        is_more_better=False,
        definition="mean absolute difference of the log-probability of each token but the first of"
        " 12 texts, given those before it, from that by an f32 forward pass of the dequantized"
        " weights",
    ),
    Figure(
        name="top",
        title="top-1 agreement",
        unit="%",
        is_more_better=True,
        definition="share of these places whose likeliest token is that of the f32 pass",
    ),
    Figure(
        name="perplexity",
        title="perplexity's distance from f32's",
        unit="%",
        is_more_better=False,
        definition="how far the perplexity of all these places together is above or below that of"
        " the f32 pass",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """T token ids, and what the f32 forward pass says of all but the first: [T - 1]."""

    token_ids: Sequence[int]
    logprobs: np.ndarray
    top: np.ndarray


def measure_start(
    contender: Contender, model: str, folder: str, options: Sequence[str], vocab_size: int
) -> Mapping[str, float]:
    """Returns START_FIGURES of a new process. Raises PeerError."""
    if contender.program is None:
        raise PeerError(contender.reason)
    room = room_for([FIRST, ONE], model, folder, options)
    with PeerProcess(contender.program) as process:
        process.load(room)
        process.prepare(ONE.num_requests, ONE.request_len)
        process.generate(FIRST.prompts(vocab_size, (0,)), FIRST.output_len)
        start_s = time.monotonic() - process.started_s
        process.generate(ONE.prompts(vocab_size, (1,)), ONE.output_len)
        memory = [memory_of(pid) for pid in family_of(process.pid)]
    return {"start": start_s, **_megabytes(memory)}


def _megabytes(memory: Sequence[Memory]) -> dict[str, float]:
    return {
        "peak": sum(one.peak_resident for one in memory) / 1e6,
        "resident": sum(one.proportional for one in memory) / 1e6,
    }


def read_texts(path: Path = GOLDENS) -> list[Text]:
    """Returns the texts and what an f32 forward pass in torch said of them."""
    with np.load(path) as golden:
        names = [name.removesuffix(".logprobs") for name in golden if name.endswith(".logprobs")]
        return [
            Text(
                token_ids=golden[f"{name}.token_ids"].tolist(),
                logprobs=golden[f"{name}.logprobs"].astype(np.float64),
                top=golden[f"{name}.top"],
            )
            for name in names
        ]


def measure_quality(contender: Contender, texts: Sequence[Text]) -> Mapping[str, float]:
    """Returns QUALITY_FIGURES. Raises PeerError where an engine gives no such scores."""
    process = contender.process
    longest = max(len(text.token_ids) for text in texts)
    process.prepare(1, longest + 1)
    scores = [process.score(text.token_ids) for text in texts]
    logprobs = np.concatenate([np.asarray(score.logprobs, np.float64) for score in scores])
    if not np.isfinite(logprobs).all():
        raise ConfigError("got a log-probability that is no number")
    expected = np.concatenate([text.logprobs for text in texts])
    top = np.concatenate([np.asarray(score.top) for score in scores])
    return {
        "difference": float(np.abs(logprobs - expected).mean()),
        "top": 100 * float((top == np.concatenate([text.top for text in texts])).mean()),
        "perplexity": 100 * abs(float(np.exp((expected - logprobs).mean())) - 1),
    }
