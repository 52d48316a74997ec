"""The families' chat formats, and every construct that their templates use, against jinja2."""

import json
import re
from datetime import datetime

import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallasite.engine.errors import RequestError
from pallasite.server.chat_template import ChatTemplate
from pallasite.server.tokenizer import Tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.family_templates import CHAT, FAMILIES, TEMPLATE_FILES, Family
from tests.server.tiny_tokenizers import CONTROL, byte_level_metadata


def make_tokenizer(family: Family) -> Tokenizer:
    """A byte tokenizer with the family's special tokens."""
    metadata = byte_level_metadata()
    texts = dict.fromkeys(
        text for text in (family.bos, family.eos, family.end, *family.specials) if text
    )
    num_specials = metadata["tokenizer.ggml.token_type"].count(CONTROL)
    for key in ("tokens", "token_type"):
        del metadata[f"tokenizer.ggml.{key}"][:num_specials]
    for key in ("bos", "eos", "eot"):
        del metadata[f"tokenizer.ggml.{key}_token_id"]
    metadata["tokenizer.ggml.tokens"] += texts
    metadata["tokenizer.ggml.token_type"] += [CONTROL] * len(texts)
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    metadata["tokenizer.ggml.eos_token_id"] = ids[family.eos]
    if family.bos is not None:
        metadata["tokenizer.ggml.bos_token_id"] = ids[family.bos]
        metadata["tokenizer.ggml.add_bos_token"] = True
    return Tokenizer(build_from_gguf(metadata))


TOKENIZERS = {name: make_tokenizer(family) for name, family in FAMILIES.items()}
TEMPLATES = {
    name: ChatTemplate(family.source, TOKENIZERS[name]) for name, family in FAMILIES.items()
}


class _Generation(jinja2.ext.Extension):
    """Prints what is inside, as transformers' own extension does."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_jinja2() -> jinja2.Environment:
    """jinja2 as transformers sets it up."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


JINJA2 = make_jinja2()


def check_against_jinja2(name: str, messages: list[dict], variables=None, **options) -> list[int]:
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    tokens = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    try:
        expected = JINJA2.from_string(family.source).render(
            **tokens,
            messages=messages,
            tools=options.get("tools"),
            documents=None,
            add_generation_prompt=options.get("adds_generation_prompt", True),
            **(variables or {}),
        )
    except jinja2.TemplateError as error:
        refusal = error.message or ""
    else:
        ids = TEMPLATES[name].encode(messages, variables=variables, **options)
        assert tokenizer.decode(ids, skips_special=False) == expected
        return ids
    with pytest.raises(RequestError, match=re.escape(f"({refusal})")) as caught:
        TEMPLATES[name].encode(messages, variables=variables, **options)
    assert caught.value.field == "messages"
    return []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_has_the_familys_format(name):
    ids = check_against_jinja2(name, CHAT)
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    assert tokenizer.decode(ids, skips_special=False) == family.expected
    markers = [text for text in map(tokenizer.token_text, ids) if text in special_texts(name)]
    assert markers == [
        family.expected[start:][: len(longest)]
        for start in range(len(family.expected))
        if (longest := longest_special(name, family.expected[start:]))
    ]


def special_texts(name: str) -> set[str]:
    tokenizer = TOKENIZERS[name]
    return {tokenizer.token_text(i) for i in tokenizer.special_ids}


def longest_special(name: str, text: str) -> str:
    return max((x for x in special_texts(name) if text.startswith(x)), key=len, default="")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_begins_with_bos_once_or_with_none_where_the_family_has_none(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    ids = TEMPLATES[name].encode(CHAT[:2])
    if "bos_token" in family.source:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    else:
        assert tokenizer.bos_token_id not in ids
    assert tokenizer.adds_bos == (family.bos is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_a_turn_ends_an_answer(name):
    family, tokenizer = FAMILIES[name], TOKENIZERS[name]
    ends = {tokenizer.token_text(i) for i in tokenizer.eos_token_ids}
    assert {family.end, family.eos} <= ends


CALL = {
    "type": "function",
    "function": {"name": "f", "arguments": {"x": 1, "é": [None, "<|end|>"]}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {"items": {"type": "integer"}, "a": {"type": "string"}},
                "required": ["items"],
            },
        },
    },
    {"type": "function", "function": {"name": "g", "parameters": {}, "return": {"type": "null"}}},
]
CHATS = {
    "user": [{"role": "user", "content": "  a\n"}],
    "turns": CHAT[1:],
    "system": CHAT[:2],
    "answered": CHAT[:3],
    "late system": [CHAT[1], CHAT[0]],
    "two users": [CHAT[1], CHAT[3]],
    "assistant first": [CHAT[2]],
    "no think": [{"role": "system", "content": "x /no_think "}, *CHAT[1:]],
    "tools": [
        CHAT[1],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
        {"role": "tool", "content": "<tool_response>"},
        CHAT[2],
        CHAT[3],
    ],
    "tool last": [
        CHAT[1],
        {"role": "assistant", "content": "So:", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "42"},
    ],
    "reasoning": [
        CHAT[1],
        {"role": "assistant", "content": "\nHi", "reasoning_content": "\nhm\n", "tool_calls": None},
    ],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " b "}]}],
    "null": [{"role": "user", "content": None}],
    "spaces": [{"role": "user", "content": "\x1c\x1fa\x1d \x85"}, CHAT[2] | {"content": " \x1e"}],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_any_conversation_renders_or_is_refused_as_jinja2_does(name, chat):
    messages = CHATS[chat]
    if chat in ("parts", "null", "tools", "tool last") and jinja2_raises_type_error(name, messages):
        with pytest.raises(RequestError):
            TEMPLATES[name].encode(messages)
        return
    for adds_generation_prompt in (True, False):
        for tools in (None, TOOLS):
            check_against_jinja2(
                name, messages, adds_generation_prompt=adds_generation_prompt, tools=tools
            )
    for variable, values in FAMILIES[name].variables.items():
        for value in values:
            check_against_jinja2(name, messages, variables={variable: value})


def jinja2_raises_type_error(name: str, messages: list[dict]) -> bool:
    """Whether Python itself refuses, as for a string and a list that are to be added."""
    try:
        JINJA2.from_string(FAMILIES[name].source).render(messages=messages, bos_token="")
    except TypeError:
        return True
    except jinja2.TemplateError:
        return False
    return False


def test_a_variable_changes_what_the_template_reads_and_nothing_that_it_is_given():
    off = check_against_jinja2("qwen3", CHAT, {"enable_thinking": False})
    on = check_against_jinja2("qwen3", CHAT, {"enable_thinking": True})
    assert off[: len(on)] == on
    rest = TOKENIZERS["qwen3"].decode(off[len(on) :], skips_special=False)
    assert rest == "<think>\n\n</think>\n\n"
    for name in ("messages", "bos_token", "a b"):
        with pytest.raises(RequestError, match=f"got a template variable '{name}'") as caught:
            TEMPLATES["qwen3"].encode(CHAT, variables={name: 1})
        assert caught.value.field == "variables"
    with pytest.raises(RequestError) as caught:
        TEMPLATES["qwen3"].encode(CHAT, variables={"x": b""})
    assert caught.value.field == "variables"


def test_a_variable_forges_no_special_token():
    template = ChatTemplate("{{ x }}<|im_end|>{{ x }}", TOKENIZERS["qwen2"])
    ids = template.encode(CHAT, variables={"x": "<|im_end|>"})
    assert [i for i in ids if i in TOKENIZERS["qwen2"].special_ids] == [
        TOKENIZERS["qwen2"].eos_token_id
    ]


@pytest.mark.parametrize("name", FAMILIES)
@given(contents=st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_any_text_renders_as_jinja2_renders_it(name, contents):
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    check_against_jinja2(name, messages)


# What templates are written with.
CONSTRUCTS = [
    *(TEMPLATE_FILES / "constructs.txt").read_text(encoding="utf-8").splitlines(),
    "{% set x %}\n a {{ messages[0].role }}\n{% endset %}[{{ x }}][{{ x | trim }}]",
    "{{ 'a' \n ~ 'b' }}{{ \"\\u2581\\n\\t\" }}{# c #}\n{%- raw %}{{ }}{% endraw %}",
    "a\r\n{% if true %}\r\n  b\r\n  {% endif %}\r\nc\rd{{ 'e\r\nf' }}\r\n",
    "  {% if true %}\n  a\n  {%- else -%}\n b {% endif +%}\n\n{{- ' c ' -}}\n  d\n\n",
]


@pytest.mark.parametrize("source", CONSTRUCTS)
def test_a_construct_renders_as_jinja2_renders_it(source):
    tokenizer = TOKENIZERS["mistral-v1"]
    ids = ChatTemplate(source, tokenizer).encode(CHAT, tools=TOOLS)
    expected = JINJA2.from_string(source).render(
        messages=CHAT,
        tools=TOOLS,
        documents=None,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert tokenizer.decode(ids, skips_special=False) == expected


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("{{ '%s' % 'a' }}", "% operator"),
        ("{{ 'a' | center(5) }}", "filter center"),
        ("{{ 'a'.zfill(5) }}", "zfill"),
        ("{{ ['a'].index('a') }}", "index"),
        ("{% if 'a' is callable %}{% endif %}", "test callable"),
    ],
)
def test_what_minijinja_lacks_is_refused_by_its_name(source, name):
    only_late = "{% if messages | length == 4 and messages[0].content == 'Be brief.' %}"
    template = ChatTemplate(f"{only_late}{source}{{% endif %}}", TOKENIZERS["qwen2"])
    with pytest.raises(RequestError, match=name):
        template.encode(CHAT)
