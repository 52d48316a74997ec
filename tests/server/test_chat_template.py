"""Chat templates in the styles of real checkpoints, against jinja2; and messages that forge."""

import json
import time
from datetime import datetime

import jinja2.ext
import jinja2.sandbox
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallasite.engine.errors import ConfigError, RequestError
from pallasite.server.chat_template import MAX_CHARS, ChatTemplate
from pallasite.server.tokenizer import Tokenizer, load_tokenizer
from pallasite.server.tokenizer_gguf import build_from_gguf
from tests.server.tiny_tokenizers import SPECIALS, byte_level, byte_level_metadata

TOKENIZER = byte_level()
TEMPLATES = {
    "chatml": """\
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {%- endif -%}
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
""",
    "headers": """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "instructions": """\
{%- set ns = namespace(system='', turns=0) %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system ~ message.content ~ '\\n\\n' %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages | rejectattr('role', 'equalto', 'system') %}
    {%- if (message.role == 'user') != (ns.turns % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.first else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
""",
    "macros": """\
{%- macro turn(role, content='') %}
{{ '<|im_start|>' }}{{ role | upper }}: {{ content.split('</think>')[-1].lstrip('\\n') }}<|im_end|>
{% endmacro -%}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {% if loop.index > 8 %}
        {% break %}
    {% endif %}
    {% generation %}
{{ turn(message.role, message.content) }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>' ~ 'ASSISTANT:' }}
{% endif %}
""",
}
CHATS = {
    "one": [{"role": "user", "content": '  hello <world>\'s "é"\n'}],
    "system": [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello 123 "},
        {"role": "user", "content": "数学 🙂\r\n"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": [1, None, "<&'>"]}}}]


class _Generation(jinja2.ext.Extension):
    """Prints what is inside, as transformers' own extension does."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _render_with_jinja2(source: str, **context) -> str:
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source).render(
        bos_token="<s>", eos_token="<|im_end|>", **context
    )


def _check_against_jinja2(name: str, messages: list[dict], **options) -> list[int]:
    ids = ChatTemplate(TEMPLATES[name], TOKENIZER).encode(messages, **options)
    text = _render_with_jinja2(
        TEMPLATES[name],
        messages=messages,
        add_generation_prompt=options.get("adds_generation_prompt", True),
        tools=options.get("tools"),
    )
    assert TOKENIZER.decode(ids, skips_special=False) == text
    return ids


@pytest.mark.parametrize("adds_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_jinja2_renders_them(name, chat, adds_generation_prompt):
    ids = _check_against_jinja2(name, CHATS[chat], adds_generation_prompt=adds_generation_prompt)
    text = TOKENIZER.decode(ids, skips_special=False)
    assert ids == TOKENIZER.encode_pieces(TOKENIZER.split_special(text))
    assert not TOKENIZER.special_ids.isdisjoint(ids)


def test_tools_and_calls_render_as_jinja2_renders_them():
    call = {"function": {"name": "f", "arguments": {"x": "<|eot_id|>"}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "é<|eot_id|>"}]},
    ]
    ids = _check_against_jinja2("headers", messages, tools=TOOLS)
    assert ids.count(SPECIALS.index("<|eot_id|>")) == 4
    text = TOKENIZER.decode(ids, skips_special=False)
    assert '"é": [\n' in text
    assert "<&'>" in text


def test_chatml_gives_these_very_ids():
    ids = ChatTemplate(TEMPLATES["chatml"], TOKENIZER).encode(
        [{"role": "system", "content": "hello"}, {"role": "user", "content": "<|im_end|>"}]
    )
    pieces = [1, "system\nhello", 2, "\n", 1, "user\n<|im_end|>", 2, "\n", 1, "assistant\n"]
    expected = [
        i
        for piece in pieces
        for i in (
            [piece]
            if isinstance(piece, int)
            else TOKENIZER.encode(piece, adds_special_tokens=False)
        )
    ]
    assert ids == expected


FRAGMENTS = ["<", "|", ">", "<|", "|>", "im_", "end|>", "im_end|>", "<|im_en", "<|im_end|>", "s>"]
FRAGMENTS += ["<s", "<s>", "[INST", "]", "[/", "INST]", "</", "eot_id|>", "<|eot_id|>", "<think>"]
FRAGMENTS += [" ", "\n", "x", "\U0010fffd", "\U0010fffc"]
FORGERIES = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(FORGERIES, min_size=1, max_size=5))
def test_no_message_forges_a_special_token(name, contents):
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    ids = _check_against_jinja2(name, messages)
    innocent = [message | {"content": "x"} for message in messages]
    structure = ChatTemplate(TEMPLATES[name], TOKENIZER).encode(innocent)
    assert [i for i in ids if i in TOKENIZER.special_ids] == [
        i for i in structure if i in TOKENIZER.special_ids
    ]


def test_two_messages_and_the_template_between_them_forge_nothing():
    contents = ["<|im_", "end|>", "a<|im_end", "|>", "im_end|>", "<|im_end|", "> <"]
    messages = [{"role": "user", "content": content} for content in contents]
    for between in ("", "|", "<|", ">"):
        source = f"{{% for m in messages %}}{{{{ m.content | trim }}}}{between}{{% endfor %}}"
        ids = ChatTemplate(source, TOKENIZER).encode(messages)
        assert TOKENIZER.special_ids.isdisjoint(ids)
        assert TOKENIZER.decode(ids, skips_special=False) == between.join([*contents, ""])


def test_special_tokens_that_overlap_are_all_hidden():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][:3] = ["[a]", "]b[", "[c]"]
    tokenizer = Tokenizer(build_from_gguf(metadata))
    template = ChatTemplate("{{ messages[0].content }}[c]", tokenizer)
    for content in ("[a]b[c]", "[a]b[a]b[", "]b[c]b["):
        ids = template.encode([{"role": "user", "content": content}])
        assert [i for i in ids if i in tokenizer.special_ids] == [2]
        assert tokenizer.decode(ids, skips_special=True) == content


def test_keys_forge_nothing():
    source = (
        "{% for m in messages %}{% for k in m %}{{ k }}{% endfor %}{% endfor %}{{ messages[0].a }}"
    )
    message = {"role": "user", "<|im_end|>": 1, "a": {"</s": {"<s>": "x"}}}
    ids = ChatTemplate(source, TOKENIZER).encode([message])
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert "<|im_end|>" in TOKENIZER.decode(ids, skips_special=False)


def test_a_length_that_a_template_measures_is_the_messages_own():
    source = "{{ messages[0].content | length }}"
    ids = ChatTemplate(source, TOKENIZER).encode([{"role": "user", "content": "<s><|im_end|><"}])
    assert TOKENIZER.decode(ids, skips_special=False) == "14"


def test_a_template_reads_the_date():
    source = "{{ strftime_now('%Y-%m-%d') }}"
    template = ChatTemplate(source, TOKENIZER)
    before = f"{datetime.now():%Y-%m-%d}"
    ids = template.encode([{"role": "user", "content": ""}])
    assert before <= TOKENIZER.decode(ids, skips_special=True) <= f"{datetime.now():%Y-%m-%d}"


def _refused(source: str, messages: list, **options) -> RequestError:
    template = ChatTemplate(source, TOKENIZER)
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        template.encode(messages, **options)
    assert time.process_time() - start < 1.0
    return caught.value


GO = [{"role": "user", "content": "go"}]
IF_GO = "{% if messages[0].content == 'go' %}"


@pytest.mark.parametrize(
    "work",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(40) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(40) %}"
        "{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='aa') %}"
        "{% for i in range(40) %}{% set n.x = f(n.x) %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ '%999999999s' | format('a') }}",
    ],
)
def test_a_template_that_never_ends_or_grows_is_stopped_within_a_second(work):
    error = _refused(f"{IF_GO}{work}{{% endif %}}", GO)
    assert error.field == "messages"
    assert "ran out of fuel" in str(error)


def test_a_rendering_that_is_too_long_is_refused():
    content = "a" * (MAX_CHARS // 2 + 1)
    error = _refused(
        "{{ messages[0].content }}{{ messages[0].content }}", [{"role": "user", "content": content}]
    )
    assert f"render to {MAX_CHARS + 2} characters" in str(error)


def test_endless_recursion_is_stopped():
    source = f"{{% macro f() %}}{{{{ f() }}}}{{% endmacro %}}{IF_GO}{{{{ f() }}}}{{% endif %}}"
    assert "recursion limit" in str(_refused(source, GO))


def test_a_refusal_of_the_template_reaches_the_user():
    error = _refused(TEMPLATES["instructions"], [{"role": "assistant", "content": "hello"}])
    assert "(Roles must alternate user/assistant" in str(error)
    assert error.field == "messages"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "got no messages"),
        ([{"content": "hello"}], "got role None in message 0; a message has a role, one of system"),
        ([*GO, {"role": "user|>", "content": "a"}], "got role 'user|>' in message 1"),
        ([{"role": ["user"], "content": "a"}], "got role ['user'] in message 0"),
        ([{"role": "user", "content": "a\udfff"}], "got U+DFFF at character 1 of messages"),
        ([{"role": "user", "content": b"a"}], "got a bytes 2 levels deep in messages"),
        ([{"role": "user", "content": "a" * (MAX_CHARS + 1)}], "at most 4194304"),
        ([{"role": "user", "content": None}], "unsupported types"),
    ],
)
def test_messages_of_the_wrong_form_are_refused(messages, message):
    error = _refused(TEMPLATES["chatml"], messages)
    assert message in str(error)
    assert error.field == "messages"


def test_nesting_is_bounded():
    content: object = "a"
    for _ in range(5000):
        content = [content]
    error = _refused(TEMPLATES["chatml"], [{"role": "user", "content": content}])
    assert "got a list 32 levels deep in messages" in str(error)
    error = _refused(TEMPLATES["headers"], GO, tools=[{"a": content}])
    assert error.field == "tools"


def test_taking_every_private_character_is_refused():
    content = "".join(map(chr, range(0x100000, 0x10FFFE))) + "<s>"
    error = _refused(TEMPLATES["chatml"], [{"role": "user", "content": content}])
    assert "got messages with all 65,534 characters" in str(error)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "line 1"),
        ("{{ messages | nothing }}", "filter nothing is unknown"),
        ("{{ nothing() }}", "nothing is unknown"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "fuel"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_the_start(source, message):
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(source, TOKENIZER)


def test_a_template_of_sentencepiece_style_specials_without_bos_or_eos():
    metadata = byte_level_metadata()
    for name in ("bos", "eos", "eot"):
        del metadata[f"tokenizer.ggml.{name}_token_id"]
    tokenizer = Tokenizer(build_from_gguf(metadata))
    ids = ChatTemplate("{{ bos_token }}hello{{ eos_token }}", tokenizer).encode(GO)
    assert tokenizer.decode(ids, skips_special=False) == "hello"


def test_smollm2s_own_template(real_model_path):
    tokenizer = load_tokenizer(real_model_path)
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    messages = [{"role": "user", "content": "What is <|im_end|>?"}]
    ids = template.encode(messages)
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is <|im_end|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids, skips_special=False) == expected
    assert [i for i in ids if i in tokenizer.special_ids] == [1, 2, 1, 2, 1]
    assert ids[-3:] == tokenizer.encode("assistant\n", adds_special_tokens=False)
