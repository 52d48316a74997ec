"""The command line's flags: one row a flag, its default taken from the config that it sets.

A row names a field of a frozen dataclass; the flag's name, default and place follow from it. So
`--help` cannot show another default than the one that runs.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pallasite.engine.config import (
    DEFAULT_ADAPTER_RANK,
    DEFAULT_SPECULATE_TOKENS,
    MAX_SPECULATE_TOKENS,
    EngineConfig,
    Limits,
)
from pallasite.engine.request import SamplingParams
from pallasite.models.forms import EVERY_LAYER, Rule
from pallasite.models.sharding import DATA_AXIS, MODEL_AXIS, MeshShape
from pallasite.server.config import ServerConfig, TextLimits

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a flag's text is read, and how `--help` calls it.

    `parse` raises ValueError; `allowed` then ends the message "got X; allowed is ...". `show` gives
    the text that a value is read from.
    """

    metavar: str
    parse: Callable[[str], Any]
    allowed: str
    show: Callable[[Any], str] = str

    def __call__(self, text: str) -> Any:
        try:
            return self.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text[:80]!r}; allowed is {self.allowed}") from error


def _int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
        raise ValueError
    return int(text)


def _window(text: str) -> int:
    window = _int(text)
    if window < 2:
        raise ValueError
    return window


def _ids(text: str) -> tuple[int, ...]:
    return tuple(_int(part.strip()) for part in text.split(","))


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    return _int(token_id), float(value)


def _address(text: str) -> str:
    if not re.fullmatch(r"\S+:[0-9]{1,5}", text) or not 0 < int(text.rpartition(":")[2]) < 65536:
        raise ValueError
    return text


def _rules(text: str) -> tuple[Rule, ...]:
    rules = []
    for part in filter(None, text.split(";")):
        pattern, _, form = part.rpartition("=")
        rules.append((pattern or EVERY_LAYER, form))
    if not rules:
        raise ValueError
    return tuple(rules)


def _adapter(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ValueError
    return name, Path(folder)


def _mesh(text: str) -> MeshShape:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in (DATA_AXIS, MODEL_AXIS) or name in sizes:
            raise ValueError
        sizes[name] = _int(size)
    return MeshShape(**sizes)


def choice(*values: str) -> Kind:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError
        return text

    return Kind(metavar="|".join(values), parse=parse, allowed=" or ".join(values))


WHOLE = Kind(metavar="N", parse=_int, allowed="a whole number")
WINDOW = Kind(metavar="N", parse=_window, allowed="a whole number from 2 on")
REAL = Kind(metavar="X", parse=float, allowed="a number")
SECONDS = Kind(metavar="SECONDS", parse=float, allowed="a number of seconds")
TEXT = Kind(metavar="TEXT", parse=str, allowed="a text")
FOLDER = Kind(metavar="FOLDER", parse=Path, allowed="a folder")
FILE = Kind(metavar="FILE", parse=Path, allowed="a file")
IDS = Kind(metavar="ID,ID,...", parse=_ids, allowed="token ids with commas between them")
BIAS = Kind(metavar="ID=X", parse=_bias, allowed="a token id, an equals sign and a number")
RULES = Kind(
    metavar="PATTERN=FORM;...",
    parse=_rules,
    allowed="a form, or PATTERN=FORM with ; between them",
    show=lambda rules: ";".join(map("=".join, rules)),
)
ADAPTER = Kind(metavar="NAME=FOLDER", parse=_adapter, allowed="a name, = and a folder")
MESH = Kind(metavar="data=N,model=N", parse=_mesh, allowed="as in data=2,model=4")
ADDRESS = Kind(metavar="HOST:PORT", parse=_address, allowed="HOST:PORT, as 127.0.0.1:9000")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag.

    Attributes:
        field: the config's field; the flag is called the same.
        kind: how its value is read; None for one that takes none and turns the field's False to
            True.
        help: what it does.
        unset: what a default of None means.
    """

    field: str
    kind: Kind | None
    help: str
    unset: str = ""


ENGINE_FLAGS = (
    Flag(
        field="weights",
        kind=choice("auto", "bf16", "f32"),
        help="the form of weights that nothing else gives one, and the type of every matrix"
        " product's inputs; auto is bf16, but leaves a GGUF's quantized weights as they are where"
        " the CPU multiplies them so",
    ),
    Flag(
        field="quantize",
        kind=RULES,
        help="the form of the weights whose names a pattern is found in, as in"
        " 'mlp=int4:64;self_attn=int8'; a form alone is every layer's; forms are f32, bf16, fp8,"
        " q4_1, q8_0, int8, w8a8, int4 and w4a8, the last four with :N for groups of N",
    ),
    Flag(
        field="cache",
        kind=choice("auto", "int8", "fp8"),
        help="what cached keys and values are rounded to; auto is the type of --weights, fp8 is for"
        " devices that multiply it",
    ),
    Flag(
        field="mesh",
        kind=MESH,
        help="devices: data shards that serve requests of their own, and devices that share the"
        " weights of each; a CPU is cut into as many",
    ),
    Flag(field="max_requests", kind=WHOLE, help="completions that run at once, at least 2"),
    Flag(
        field="max_context_len",
        kind=WHOLE,
        help="prompt and completion tokens of one completion at most",
        unset="the model's own limit",
    ),
    Flag(field="max_batch_tokens", kind=WHOLE, help="tokens that one step computes at most"),
    Flag(
        field="num_pages",
        kind=WHOLE,
        help="pages of the cache",
        unset="what --cache-tokens comes to",
    ),
    Flag(
        field="cache_tokens",
        kind=WHOLE,
        help="cached tokens over all requests",
        unset="on a CPU 1,024 a request, one whole context at least; elsewhere all that fits",
    ),
)
ADAPTER_FLAGS = (
    Flag(field="max_adapters", kind=WHOLE, help="adapters loaded at once at most"),
    Flag(
        field="max_adapter_rank",
        kind=WHOLE,
        help="the highest rank of one, where there is room for any",
        unset=str(DEFAULT_ADAPTER_RANK),
    ),
)
SPECULATION_FLAGS = (
    Flag(
        field="speculate",
        kind=choice("ngram"),
        help="draft tokens, to verify several a step; ngram: those after the same ones before",
        unset="no speculation",
    ),
    Flag(
        field="speculate_tokens",
        kind=WHOLE,
        help=f"tokens drafted for a completion in a step at most, up to {MAX_SPECULATE_TOKENS}",
        unset=f"{DEFAULT_SPECULATE_TOKENS} with --speculate",
    ),
)
QUEUE_FLAGS = (
    Flag(field="max_waiting", kind=WHOLE, help="requests that wait at most"),
    Flag(
        field="max_unread_tokens",
        kind=WHOLE,
        help="tokens that a stream's reader may lag before its request is ended",
    ),
    Flag(field="max_leases", kind=WHOLE, help="KV handles held at once at most"),
    Flag(field="max_lease_s", kind=SECONDS, help="the longest lease of a KV handle"),
)
LIMIT_FLAGS = (
    Flag(field="max_n", kind=WHOLE, help="completions of one request at most"),
    Flag(field="max_logprobs", kind=WHOLE, help="likeliest tokens reported a position at most"),
    Flag(field="max_stop_token_ids", kind=WHOLE, help="stop ids of one request at most"),
    Flag(field="max_logit_bias", kind=WHOLE, help="biased token ids of one request at most"),
    Flag(field="max_bad_words", kind=WHOLE, help="bad words of one request at most"),
    Flag(field="max_bad_word_len", kind=WHOLE, help="token ids of one bad word at most"),
    Flag(field="max_request_id_len", kind=WHOLE, help="characters of a request's name at most"),
    Flag(field="max_tenant_len", kind=WHOLE, help="characters of a tenant's name at most"),
)
TEXT_LIMIT_FLAGS = (
    Flag(field="max_text_len", kind=WHOLE, help="characters of a prompt or a whole chat at most"),
    Flag(field="max_messages", kind=WHOLE, help="messages of a chat at most"),
    Flag(field="max_stop", kind=WHOLE, help="stop texts of one request at most"),
    Flag(field="max_stop_len", kind=WHOLE, help="characters of one stop text at most"),
    Flag(
        field="max_bad_word_len",
        kind=WHOLE,
        help="characters of one bad word given as text at most",
    ),
)
SERVER_FLAGS = (
    Flag(
        field="model_name",
        kind=TEXT,
        help="what clients call the model; empty takes MODEL's own file or folder name",
    ),
    Flag(field="host", kind=TEXT, help="the address to listen on"),
    Flag(field="port", kind=WHOLE, help="gRPC's port; 0 picks a free one"),
    Flag(
        field="admin_port",
        kind=WHOLE,
        help="the port of the Admin service, on loopback only",
        unset="no Admin service",
    ),
    Flag(field="max_message_bytes", kind=WHOLE, help="the largest message that is taken"),
    Flag(field="max_calls", kind=WHOLE, help="calls in flight at most"),
    Flag(
        field="drain_s",
        kind=SECONDS,
        help="how long requests in flight may go on after SIGTERM",
    ),
    Flag(
        field="stall_s",
        kind=SECONDS,
        help="a step that takes this long turns health to NOT_SERVING",
    ),
    Flag(
        field="profile_dir",
        kind=FOLDER,
        help="where Admin.StartProfile writes",
        unset="it is refused",
    ),
)
SAMPLING_FLAGS = (
    Flag(field="max_tokens", kind=WHOLE, help="completion tokens at most"),
    Flag(field="min_tokens", kind=WHOLE, help="no stop before this many tokens"),
    Flag(field="n", kind=WHOLE, help="independent completions of the prompt"),
    Flag(field="temperature", kind=REAL, help="0 is greedy; else logits are divided by it"),
    Flag(field="top_k", kind=WHOLE, help="keep the N most likely tokens; 0 keeps all"),
    Flag(field="top_p", kind=REAL, help="keep the likeliest tokens of this mass, in (0, 1]"),
    Flag(
        field="min_p", kind=REAL, help="keep tokens this times as likely as the likeliest, 0 to 1"
    ),
    Flag(
        field="repetition_penalty", kind=REAL, help="against tokens that stand before; 0.01 to 100"
    ),
    Flag(field="presence_penalty", kind=REAL, help="against tokens of the completion, once"),
    Flag(field="frequency_penalty", kind=REAL, help="against tokens of the completion, each time"),
    Flag(field="allowed_token_ids", kind=IDS, help="only these may be sampled", unset="all may be"),
    Flag(field="seed", kind=WHOLE, help="the same seed gives the same tokens", unset="a drawn one"),
    Flag(
        field="logprobs",
        kind=WHOLE,
        help="report log-probabilities and this many likeliest tokens, 0 to 20",
        unset="none",
    ),
    Flag(
        field="prompt_logprobs", kind=WHOLE, help="the same for the prompt's tokens", unset="none"
    ),
    Flag(field="include_stop", kind=None, help="what stopped it is part of the completion"),
    Flag(field="ignore_eos", kind=None, help="end-of-sequence ids do not stop it"),
)

TABLES: tuple[tuple[type, tuple[Flag, ...]], ...] = (
    (EngineConfig, ENGINE_FLAGS + ADAPTER_FLAGS + SPECULATION_FLAGS + QUEUE_FLAGS),
    (Limits, LIMIT_FLAGS),
    (TextLimits, TEXT_LIMIT_FLAGS),
    (ServerConfig, SERVER_FLAGS),
    (SamplingParams, SAMPLING_FLAGS),
)


def engine_flags(command: str) -> tuple[Flag, ...]:
    """The flags of an engine that a command takes: `demo` shows the model's own answer."""
    speculates = command in ("serve", "generate", "chat", "info")
    adapters = ADAPTER_FLAGS if command != "demo" else ()
    return ENGINE_FLAGS + adapters + (SPECULATION_FLAGS if speculates else ())


def add_flags(
    parser: argparse.ArgumentParser, title: str, config: type, flags: Sequence[Flag]
) -> None:
    """Adds a group of flags with `config`'s own defaults."""
    group = parser.add_argument_group(title)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for flag in flags:
        name = flag_name(config, flag)
        default = defaults[flag.field]
        if flag.kind is None:
            assert default is False
            group.add_argument(
                name, dest=_place(config, flag), action="store_true", help=f"{flag.help} (off)"
            )
            continue
        shown = flag.unset if default is None else default
        if default in ("", ()):
            shown = "none" if default == () else repr(default)
        group.add_argument(
            name,
            dest=_place(config, flag),
            default=default,
            type=flag.kind,
            metavar=flag.kind.metavar,
            help=f"{flag.help} (default: {shown})".replace("%", "%%"),
        )


def read_flags(
    args: argparse.Namespace, config: Callable[..., _T], flags: Sequence[Flag], **more: Any
) -> _T:
    """Makes a config of what `add_flags` added, and of `more`. Raises ConfigError as it does."""
    values = {flag.field: getattr(args, _place(config, flag)) for flag in flags}
    return config(**values, **more)


def shown_flags(config: Any, flags: Sequence[Flag]) -> list[str]:
    """The command line that `read_flags` makes this config's fields of, without the defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    line = []
    for flag in flags:
        if (value := getattr(config, flag.field)) != defaults[flag.field]:
            assert flag.kind is not None
            line += [flag_name(type(config), flag), flag.kind.show(value)]
    return line


def flags_given(args: argparse.Namespace, config: type, flags: Sequence[Flag]) -> list[str]:
    """The flags whose values are not the defaults, as they are typed."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return [
        flag_name(config, flag)
        for flag in flags
        if getattr(args, _place(config, flag)) != defaults[flag.field]
    ]


def flag_name(config: type, flag: Flag) -> str:
    """The flag as it is typed. A text's limit that a token limit shares its name with says so."""
    is_shared = config is TextLimits and flag.field in {f.field for f in LIMIT_FLAGS}
    return f"--{flag.field}{'_text' if is_shared else ''}".replace("_", "-")


def _place(config: Any, flag: Flag) -> str:
    return f"{config.__name__}.{flag.field}"
