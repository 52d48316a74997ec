"""`pallasite evaluate`: how well a model, in the form that the flags give it, predicts a text."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pallasite.engine.config import EngineConfig
from pallasite.models.checkpoint import open_checkpoint
from pallasite.models.errors import ConfigError
from pallasite.models.pull import locate
from pallasite.models.sharding import MeshShape
from pallasite.server.arguments import engine_config, own_adapters
from pallasite.server.session import open_engine
from pallasite.server.text_request import Scores
from pallasite.server.tokenizer import Tokenizer, load_tokenizer

_ALL_F32 = (("", "f32"),)
"""A rule that every matrix's name matches, whatever a checkpoint holds it in."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of a text's tokens but the first of each window.

    Attributes:
        logprobs: f64, each token's log-probability given those before it in its window.
        top: the likeliest token at the same places.
    """

    logprobs: np.ndarray
    top: np.ndarray

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-probability."""
        return float(np.exp(-self.logprobs.mean()))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a model's predictions differ from a reference's.

    Attributes:
        perplexity: the reference's.
        perplexity_ratio: the model's over the reference's.
        logprob_difference: the mean absolute difference of the tokens' log-probabilities.
        top_agreement: the share of places with the same likeliest token.
    """

    perplexity: float
    perplexity_ratio: float
    logprob_difference: float
    top_agreement: float

    @classmethod
    def of(cls, model: Predictions, reference: Predictions) -> "Comparison":
        return cls(
            perplexity=reference.perplexity,
            perplexity_ratio=model.perplexity / reference.perplexity,
            logprob_difference=float(np.abs(model.logprobs - reference.logprobs).mean()),
            top_agreement=float((model.top == reference.top).mean()),
        )


def evaluate(args: argparse.Namespace) -> int:
    """Prints a model's perplexity on a text and, with --against, how it differs from another's."""
    path, config, adapters = locate(args.model), engine_config(args), own_adapters(args)
    other = None if args.against is None else locate(args.against)
    text = read_text(args.text, "--text")
    windows = cut(text, load_tokenizer(path), args.window)
    if other is not None and cut(text, load_tokenizer(other), args.window) != windows:
        raise ConfigError(
            "got --against with another vocabulary; both models must have the same tokens; choose"
            " one of the same family"
        )
    # What the flags and a checkpoint say of forms is what is evaluated; the reference has none.
    plain = replace(
        config,
        weights="f32",
        quantize=_ALL_F32,
        cache="auto",
        mesh=MeshShape(),
        max_adapters=0,
        max_adapter_rank=None,
    )
    _check_context(path, config, windows)
    if other is not None:
        _check_context(other, plain, windows)
    model = _predict(path, config, windows, adapters, args.adapter)
    result: dict[str, object] = {
        "num_windows": len(windows),
        "num_tokens": len(model.logprobs),
        "perplexity": model.perplexity,
    }
    if other is not None:
        result["against"] = asdict(Comparison.of(model, _predict(other, plain, windows)))
    if args.json:
        print(json.dumps(result))
    else:
        _show(model, result)
    return 0


def cut(text: str, tokenizer: Tokenizer, window: int) -> list[list[int]]:
    """Returns a text's tokens in windows of at most `window`, the last of two at least.

    Each begins with what the tokenizer begins a text with, as it would if it came alone.
    """
    ids = tokenizer.encode(text, adds_special_tokens=False, field="text")
    begin = list(tokenizer.prefix_ids)
    step = window - len(begin)
    if step < 1:
        raise ConfigError(
            f"got windows of {window} tokens, {len(begin)} of which begin every text; they must be"
            " longer; raise --window"
        )
    windows = [begin + ids[start : start + step] for start in range(0, len(ids), step)]
    windows = [tokens for tokens in windows if len(tokens) > max(1, len(begin))]
    if not windows:
        raise ConfigError(
            f"got a text of {len(ids)} tokens; two at least are needed to predict one; choose a"
            " longer one"
        )
    return windows


def read_text(path: Path, flag: str) -> str:
    """Returns a file's text, or standard input's for "-". Raises ConfigError naming the flag."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode()
    except OSError as error:
        raise ConfigError(
            f"got {flag} {path.name!r}, which cannot be read ({error.strerror}); allowed is a text"
            " in UTF-8; check its name and rights"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"got {flag} {path.name!r}, which is not UTF-8; it must be; convert it"
        ) from error


def _check_context(path: Path, config: EngineConfig, windows: list[list[int]]) -> None:
    """Raises ConfigError where a window is too long for a model; before anything is loaded."""
    longest = max(map(len, windows))
    context_len = config.max_context_len or open_checkpoint(path).config.context_len
    if longest >= context_len:
        raise ConfigError(
            f"got windows of {longest} tokens in a context of {context_len}; they must be shorter;"
            " lower --window"
        )


def _predict(
    path: Path,
    config: EngineConfig,
    windows: list[list[int]],
    adapters: Sequence[tuple[str, Path]] = (),
    adapter: str = "",
) -> Predictions:
    """Predicts with one of the adapters, or with none where `adapter` is empty."""

    async def score() -> list[Scores]:
        async with open_engine(path, config, adapters) as session:
            return await session.score(windows, 1, adapter)

    scored = asyncio.run(score())
    logprobs = [value for scores in scored for value in scores.logprobs[1:] if value is not None]
    top = [places[0][0] for scores in scored for places in scores.top[:-1]]
    return Predictions(logprobs=np.array(logprobs, np.float64), top=np.array(top))


def _show(model: Predictions, result: dict[str, object]) -> None:
    print(f"perplexity {model.perplexity:.4f} over {len(model.logprobs)} tokens")
    against = result.get("against")
    if isinstance(against, dict):
        print(
            f"against    {against['perplexity']:.4f} ({against['perplexity_ratio'] - 1:+.2%})\n"
            f"mean |difference of log-probability| {against['logprob_difference']:.5f}\n"
            f"top-1 agreement {against['top_agreement']:.2%}"
        )
