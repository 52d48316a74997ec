"""`pallasite generate`, `chat` and `score`: one caller's prompts, answered here or by a server."""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pallasite.engine.request import SamplingParams
from pallasite.models.errors import ConfigError
from pallasite.server.answer import Answer, rates
from pallasite.server.arguments import sampling_params
from pallasite.server.session import Session, open_session
from pallasite.server.text_request import Prompt, Scores, TextRequest

_TOP = 5


def generate(args: argparse.Namespace) -> int:
    """Completes one prompt."""
    params = _params(args)
    if args.prompt_ids is not None:
        prompt = Prompt(token_ids=args.prompt_ids)
    else:
        prompt = Prompt(text=_read_stdin() if args.prompt == "-" else args.prompt)

    async def run() -> None:
        async with open_session(args) as session:
            answers = await _answer(args, session, _text_request(args, prompt, params))
        if args.json:
            print(json.dumps({"completions": [answer.as_json() for answer in answers]}))

    asyncio.run(run())
    return 0


def chat(args: argparse.Namespace) -> int:
    """Sends one message, or a message a line of standard input until that ends."""
    params = _params(args)
    if params.n != 1:
        raise ConfigError(
            f"got --n {params.n} in a chat; it goes on with one answer; leave --n out"
        )
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]

    async def run() -> None:
        async with open_session(args) as session:
            for text in _lines() if args.message is None else (args.message,):
                messages.append({"role": "user", "content": text})
                request = _text_request(args, Prompt(messages=tuple(messages)), params)
                (answer,) = await _answer(args, session, request)
                messages.append({"role": "assistant", "content": answer.text})
                if args.json:
                    print(json.dumps(answer.as_json()), flush=True)

    asyncio.run(run())
    return 0


def score(args: argparse.Namespace) -> int:
    """Prints how likely each token of some sequences is, and what is likeliest in its place."""
    items = _read_items(args.input)

    async def run() -> list[Scores]:
        async with open_session(args) as session:
            return await session.score([item["ids"] for item in items], _TOP, args.adapter)

    scored = asyncio.run(run())
    if args.json:
        rows = [
            {
                **item,
                "logprobs": list(scores.logprobs),
                f"top{_TOP}": [[list(pair) for pair in top] for top in scores.top],
            }
            for item, scores in zip(items, scored, strict=True)
        ]
        print(json.dumps(rows))
        return 0
    print("sequence  tokens  mean logprob  perplexity")
    for number, scores in enumerate(scored):
        known = [logprob for logprob in scores.logprobs if logprob is not None]
        mean = math.fsum(known) / len(known) if known else math.nan
        print(f"{number:8}  {len(scores.token_ids):6}  {mean:12.4f}  {math.exp(-mean):10.3f}")
    return 0


def _params(args: argparse.Namespace) -> SamplingParams:
    params = sampling_params(args)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None and not args.json:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"got {flag} without --json; only JSON shows them; add --json")
    return params


def _text_request(args: argparse.Namespace, prompt: Prompt, params: SamplingParams) -> TextRequest:
    return TextRequest(
        prompt=prompt,
        params=params,
        stop=tuple(args.stop),
        bad_words=tuple(args.bad_word),
        skips_special=not args.keep_special_tokens,
        timeout_s=args.timeout_s,
        adapter=args.adapter,
    )


async def _answer(args: argparse.Namespace, session: Session, request: TextRequest) -> list[Answer]:
    """Runs a request to its end. One completion is shown as it comes, several one by one at their
    ends, as JSON none; the rates are said on standard error. Raises RequestError where it failed.
    """
    answers = [Answer(index) for index in range(request.params.n)]
    is_alone = len(answers) == 1 and not args.json
    async for event in session.generate(request):
        answer = answers[event.index]
        answer.push(event)
        if is_alone:
            print(event.text, end="", flush=True)
        elif not args.json and event.finish is not None:
            print(f"[{event.index}] {answer.text}", flush=True)
    if is_alone:
        print(flush=True)
    for answer in answers:
        answer.check()
    print(rates(answers), file=sys.stderr)
    return answers


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "got standard input that is not UTF-8; a prompt must be; convert it"
        ) from error


def _lines() -> Iterator[str]:
    """The lines of standard input that hold something; a person is shown where to type."""
    is_person = sys.stdin.isatty()
    while True:
        if is_person:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.buffer.readline().decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                "got a line of standard input that is not UTF-8; a message must be; convert it"
            ) from error
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _read_items(path: Path) -> list[dict[str, Any]]:
    """The objects of an input file, each with `ids`. Raises ConfigError naming the first that is
    not as it must be."""
    allowed = "a JSON list of objects, each with a list of token ids under `ids`"
    try:
        items = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"got --input {path.name!r}, which cannot be read ({error.strerror}); allowed is"
            f" {allowed}; check its name and rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"got --input {path.name!r}, which is no JSON; allowed is {allowed}; mend the file"
        ) from error
    if not isinstance(items, list):
        raise ConfigError(
            f"got JSON of another kind in {path.name!r}; allowed is {allowed}; mend the file"
        )
    for number, item in enumerate(items):
        ids = item.get("ids") if isinstance(item, dict) else None
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            raise ConfigError(
                f"got element {number} of {path.name!r} without token ids; allowed is {allowed},"
                " one at least; mend the file"
            )
    return items
