"""The grammar of the command line: true defaults, and three parts to each complaint."""

import dataclasses
import re
from pathlib import Path

import pytest

from pallasite.engine.config import EngineConfig, Limits
from pallasite.engine.request import SamplingParams
from pallasite.models.errors import ConfigError
from pallasite.models.forms import EVERY_LAYER
from pallasite.models.pull import cache_folder
from pallasite.models.sharding import MeshShape
from pallasite.server.arguments import (
    build_parser,
    engine_config,
    engine_line,
    own_adapters,
    parse,
    sampling_params,
)
from pallasite.server.config import ServerConfig, TextLimits
from pallasite.server.flags import ENGINE_FLAGS, TABLES, add_flags, flag_name

# Fields that a row cannot set alone, and the flags in arguments.py that set them.
_SET_ELSEWHERE = {
    EngineConfig: {"compile_cache": "--compile-cache", "limits": "--max-n"},
    Limits: {},
    TextLimits: {},
    ServerConfig: {
        "model": "MODEL",
        "engine": "--max-requests",
        "adapters": "--load-adapter",
        "reflection": "--reflection",
        "tls": "--tls-certificate",
        "api_keys": "--api-keys",
        "text": "--max-text-len",
    },
    SamplingParams: {
        "logit_bias": "--logit-bias",
        "stop_token_ids": "--stop-token-id",
        "bad_words": "--bad-word",
    },
}


def help_of(command, capsys):
    with pytest.raises(SystemExit) as caught:
        parse([command, "--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("config", "flags"), TABLES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_field_of_a_config_can_be_set(config, flags, capsys):
    fields = {field.name for field in dataclasses.fields(config)}
    elsewhere = _SET_ELSEWHERE[config]
    assert {flag.field for flag in flags} | set(elsewhere) == fields
    text = help_of("generate" if config is SamplingParams else "serve", capsys)
    for name in elsewhere.values():
        assert name in text


@pytest.mark.parametrize(
    "command", ["serve", "demo", "generate", "chat", "score", "evaluate", "info"]
)
def test_help_shows_every_default(command, capsys):
    """Each flag's text says `(default: ...)`, `(off)` or `(required)`."""
    parser = build_parser()._subparsers._group_actions[0].choices[command]
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            shown = re.search(r"\((default: .+|required|off)\)$", action.help)
            assert shown, action.option_strings
    text = help_of(command, capsys)
    assert "(default: 32)" in text
    assert "(default: auto)" in text


def test_shown_defaults_are_the_ones_that_run(capsys):
    text = help_of("serve", capsys)
    for config, flags in TABLES[:-1]:
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for flag in flags:
            value = defaults[flag.field]
            shown = flag.unset if value is None else "''" if value == "" else value
            shown = "none" if value == () else shown
            row = re.search(
                rf"{flag_name(config, flag)} [^\s\]]+ (?P<help>.*?\(default.*?\))", text
            )
            assert row is not None, flag.field
            assert row["help"].replace("- ", "-").endswith(f"(default: {shown})")


def test_without_flags_the_configs_are_their_defaults():
    args = parse(["serve", "m"])
    cache = cache_folder() / "compiled"
    assert engine_config(args) == EngineConfig(compile_cache=cache)
    assert sampling_params(parse(["generate", "m", "--prompt", "x"])) == SamplingParams()


def test_flags_reach_their_fields():
    line = (
        "serve m --weights f32 --max-requests 4 --max-batch-tokens 64 --max-lease-s 2.5 --max-n 3"
        " --speculate ngram --speculate-tokens 5"
    )
    config = engine_config(parse([*line.split(), "--no-compile-cache", "--max-bad-word-len", "5"]))
    assert config == EngineConfig(
        weights="f32",
        max_requests=4,
        max_batch_tokens=64,
        max_lease_s=2.5,
        speculate="ngram",
        speculate_tokens=5,
        limits=Limits(max_n=3, max_bad_word_len=5),
    )


def test_sampling_flags_reach_their_fields():
    line = (
        "generate m --prompt-ids 1,2 --max-tokens 5 --min-tokens 1 --n 2 --temperature 0.5 "
        "--top-k 9 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 --seed 7"
        " --frequency-penalty -0.3 --allowed-token-ids 4,5 --logprobs 3 --prompt-logprobs 0"
        " --include-stop --ignore-eos --logit-bias 4=-1.5 --logit-bias 5=2 --stop-token-id 5"
    )
    args = parse(line.split())
    assert args.prompt_ids == (1, 2)
    assert sampling_params(args) == SamplingParams(
        max_tokens=5,
        min_tokens=1,
        n=2,
        temperature=0.5,
        top_k=9,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={4: -1.5, 5: 2.0},
        allowed_token_ids=(4, 5),
        seed=7,
        logprobs=3,
        prompt_logprobs=0,
        stop_token_ids=(5,),
        include_stop=True,
        ignore_eos=True,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "got no COMMAND; it is required; see `pallasite --help`"),
        ("serve", "got no MODEL; it is required; see `pallasite serve --help`"),
        ("sreve m", "got 'sreve' for COMMAND; allowed are .*'serve'.*; see `pallasite --help`"),
        ("serve m --port x", "got --port 'x'; allowed is a whole number; see `pallasite serve"),
        ("serve m --port 1e3", "got --port '1e3'; allowed is a whole number;"),
        ("serve m --port", "got --port without its value; expected one argument; see"),
        ("serve m --weights f16", "got --weights 'f16'; allowed is auto or bf16 or f32; see"),
        ("serve m --prot 1", "got '--prot 1'; no such argument is known; see"),
        ("serve m --max-req 4", "got '--max-req 4'; no such argument is known; see"),
        ("generate m", "got none of --prompt --prompt-ids; one is required; see"),
        ("generate m --prompt a --prompt-ids 1", "got --prompt-ids and --prompt; only one of them"),
        ("generate m --prompt a --logit-bias 3", "got --logit-bias '3'; allowed is a token id, an"),
        ("generate m --prompt-ids 1,,2", "got --prompt-ids '1,,2'; allowed is token ids with"),
        ("generate m --prompt a --server 9000", "got --server '9000'; allowed is HOST:PORT"),
        ("generate m --prompt a --server h:99999", "got --server 'h:99999'; allowed is HOST:PORT"),
        (
            "serve m --quantize ;",
            "got --quantize ';'; allowed is a form, or PATTERN=FORM with ;",
        ),
        (
            "serve m --quantize=",
            "got --quantize ''; allowed is a form, or PATTERN=FORM with ;",
        ),
        ("quantize m new --rules ;;", "got --rules ';;'; allowed is a form, or PATTERN=FORM with"),
        ("serve m --speculate eagle", "got --speculate 'eagle'; allowed is ngram; see"),
        ("serve m --speculate-tokens many", "got --speculate-tokens 'many'; allowed is a whole"),
        ("score m --input f --speculate ngram", "got '--speculate ngram'; no such argument is"),
        ("demo m --max-adapters 1", "got '--max-adapters 1'; no such argument is known; see"),
        ("demo m --load-adapter a=f", "got '--load-adapter a=f'; no such argument is known; see"),
        ("score m", "got no --input; it is required; see `pallasite score --help`"),
    ],
)
def test_a_bad_argument_is_told_in_three_parts(line, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse(line.split())
    assert str(caught.value).count("; ") >= 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("serve m --max-requests 1", "got max_requests=1; it must be at least 2; raise it"),
        ("serve m --num-pages 9 --cache-tokens 9", "got both num_pages and cache_tokens"),
        ("serve m --max-lease-s nan", "got max_lease_s=nan"),
        (
            "serve m --max-adapter-rank 64",
            "got max_adapter_rank=64 and no max_adapters; a rank is allowed where there is room",
        ),
        ("generate m --prompt x --max-adapter-rank 16", "got max_adapter_rank=16 and no max_ad"),
        (
            "serve m --speculate-tokens 4",
            "got speculate_tokens=4 and no speculation; it is allowed where tokens are drafted;",
        ),
        (
            "generate m --prompt x --speculate ngram --speculate-tokens 33",
            "got speculate_tokens=33; allowed is 1 to 32; change it",
        ),
        ("info m --max-adapter-rank 0 --max-adapters 1", "got max_adapter_rank=0; it must be at"),
    ],
)
def test_a_bad_config_is_told_in_three_parts(line, message):
    with pytest.raises(ConfigError, match=message):
        engine_config(parse(line.split()))


def test_a_semicolon_too_many_is_no_rule():
    config = engine_config(parse(["serve", "m", "--quantize", "mlp=int4;;fp8;"]))
    assert config.quantize == (("mlp", "int4"), (EVERY_LAYER, "fp8"))


def test_the_rank_of_an_adapter_has_a_default_where_there_is_room():
    assert EngineConfig(max_adapters=2).adapter_rank == 16
    assert EngineConfig(max_adapters=2, max_adapter_rank=64).adapter_rank == 64


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(compile_cache=Path("kept")),
        EngineConfig(
            weights="f32",
            quantize=(("mlp", "int4:64"), ("self_attn|lm_head", "int8")),
            cache="int8",
            mesh=MeshShape(data=2, model=4),
            max_requests=4,
            max_context_len=256,
            max_batch_tokens=64,
            cache_tokens=1024,
        ),
        EngineConfig(num_pages=9, max_adapters=2, max_adapter_rank=4),
        EngineConfig(max_waiting=8, max_leases=3, max_unread_tokens=9, limits=Limits(max_n=5)),
    ],
)
def test_an_engines_line_makes_the_same_engine(config):
    """What `demo` and the benchmarks start is what they were asked for."""
    assert engine_config(parse(["serve", "m", *engine_line(config)])) == config


@pytest.mark.parametrize(
    "command", ["generate --prompt x", "chat", "score --input f", "evaluate --text f"]
)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--adapter a", "got --adapter 'a', which is not loaded; loaded are: none; load it with"),
        ("--adapter c --load-adapter a=f --load-adapter b=f", "got --adapter 'c', .*: a, b; load"),
        ("--load-adapter a=f", "got --load-adapter of 'a', which nothing would use; allowed is"),
        ("--adapter a --load-adapter a=f --load-adapter b=f", "got --load-adapter of 'b', which"),
    ],
)
def test_what_is_loaded_for_one_answer_is_what_answers(command, line, message):
    args = parse([*command.split(), "m", "--max-adapters", "2", *line.split()])
    with pytest.raises(ConfigError, match=message) as caught:
        own_adapters(args)
    assert str(caught.value).count("; ") >= 2


def test_an_adapter_that_is_named_and_loaded_is_used():
    line = ["generate", "m", "--prompt", "x", "--max-adapters", "1"]
    assert own_adapters(parse(line)) == []
    args = parse([*line, "--load-adapter", "a=f", "--adapter", "a"])
    assert own_adapters(args) == [("a", Path("f"))]


def test_two_biases_of_one_token_contradict():
    args = parse(["generate", "m", "--prompt", "a", "--logit-bias", "3=1", "--logit-bias", "3=2"])
    with pytest.raises(ConfigError, match="two --logit-bias of one token"):
        sampling_params(args)


def test_a_changed_default_shows_in_help():
    """The table holds no default of its own that could fall behind."""
    changed = dataclasses.make_dataclass("Changed", [("max_requests", int, 77)])
    parser = build_parser()
    rows = [flag for flag in ENGINE_FLAGS if flag.field == "max_requests"]
    add_flags(parser, "changed", changed, rows)
    assert "(default: 77)" in parser.format_help()
