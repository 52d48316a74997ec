"""A conversation to token ids, by the chat template that came with the checkpoint.

A template writes the markers of roles and turns as text, so a user's text could forge them. Where
a message's text could take part in a special token's string, one of its characters is replaced
before rendering by a private one that occurs nowhere else; special tokens are then found in the
rendered text, and the characters put back in what lies between. Lengths and spaces stay as they
are, so templates that trim or measure see no difference.

Templates are data of the checkpoint: minijinja runs no Python of theirs, and `FUEL` bounds the
work and the memory of what they do in its own language. (It is charged only afterwards where a
list is multiplied and printed in one expression.)

They are written for jinja2. Where minijinja does otherwise in what templates use, it is mended
here; what it lacks (`%` on strings, a few filters, tests and methods) it refuses by name. Left is
that a whole number that a float holds is written without its ".0" where it alone goes to `tojson`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import minijinja

from pallasite.engine.errors import ConfigError, RequestError
from pallasite.server.tokenizer import Tokenizer
from pallasite.server.tokenizer_parts import check_text

# A long conversation (1 MB over 100 messages) uses a tenth of it; an endless loop ends in 0.3 s.
FUEL = 1_000_000
# Of all strings in a conversation, and of what it renders to.
MAX_CHARS = 4 << 20
MAX_DEPTH = 32
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# A block that marks the assistant's tokens for training; it prints what is inside.
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
# What every template is given, besides the special tokens.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
# Supplementary Private Use Area-B, from the end.
_PRIVATE = range(0x10FFFD, 0x0FFFFF, -1)
# Python strips these at the ends of a text as space, and Rust does not.
_PYTHON_SPACES = "\x1c\x1d\x1e\x1f"
_RARE_SPACES = (0x1680, *range(0x2000, 0x200B), 0x205F)


class ChatTemplate:
    """One checkpoint's template, parsed once. Safe to use from several threads."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a template that cannot be parsed or needs what we do not have."""
        self._tokenizer = tokenizer
        self._edges = _Edges([tokenizer.token_text(i) for i in tokenizer.special_ids])
        source = source.replace("\r\n", "\n").replace("\r", "\n")
        source = _GENERATION.sub(
            lambda match: match[1] + ("endif" if match[2] else "if true") + match[3], source
        )
        # As Hugging Face's transformers sets up its templates.
        self._environment = minijinja.Environment(
            fuel=FUEL,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_escape_callback=lambda _: False,
            filters={"tojson": _to_json},
            tests={"iterable": _is_iterable, "sequence": _is_iterable},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
            debug=False,
        )
        self._taken = set(source).union(*map(tokenizer.token_text, tokenizer.special_ids))
        self._tokens = {
            name: "" if token_id is None else tokenizer.token_text(token_id)
            for name, token_id in (
                ("bos_token", tokenizer.bos_token_id),
                ("eos_token", tokenizer.eos_token_id),
            )
        }
        self._reserved = (*_GIVEN, *self._tokens)
        try:
            self._environment.add_template("chat", source)
        except minijinja.TemplateError as error:
            raise _unusable(error) from None
        self._probe()

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        adds_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Renders a conversation and encodes it.

        `messages` are Hugging Face's: a "role" each, mostly "content", and whatever else the
        template knows; `adds_generation_prompt` ends with the beginning of an answer; `variables`
        are what else the template reads by name, such as Qwen 3's enable_thinking. Special tokens'
        strings become special ids where the template wrote them, plain text where a
        message did. Nothing is put around the whole: BOS is the template's affair.

        Raises RequestError, its field "messages", "tools" or "variables", for what has the wrong
        form or is too large, and for messages that the template refuses.
        """
        if not messages:
            raise RequestError(
                "got no messages; a conversation has at least one; add one", field="messages"
            )
        for i, message in enumerate(messages):
            _check_role(i, message.get("role"))
        variables = variables or {}
        for name in variables:
            if name in self._reserved or not name.isidentifier():
                raise RequestError(
                    f"got a template variable {name!r}; it must be a name, and none of"
                    f" {', '.join(self._reserved)}; change it",
                    field="variables",
                )
        strings = [
            *_strings(messages, "messages"),
            *_strings(tools or [], "tools"),
            *_strings(variables, "variables"),
        ]
        if (num_chars := sum(map(len, strings))) > MAX_CHARS:
            raise RequestError(
                f"got messages of {num_chars} characters; at most {MAX_CHARS} are allowed;"
                " shorten them",
                field="messages",
            )
        mask = _Mask(self._tokenizer, self._edges, self._taken.union(*strings))
        text = self._render(
            messages=[mask.hide_message(message) for message in messages],
            tools=mask.hide_all(tools),
            documents=None,
            add_generation_prompt=adds_generation_prompt,
            **{name: mask.hide_all(value) for name, value in variables.items()},
        )
        return self._tokenizer.encode_pieces(
            [
                piece if isinstance(piece, int) else mask.restore(piece)
                for piece in self._tokenizer.split_special(text)
            ]
        )

    def _render(self, **context: object) -> str:
        try:
            text = self._environment.render_template("chat", **self._tokens, **context)
        except (minijinja.TemplateError, _RefusedError) as error:
            raise RequestError(
                f"got messages that the model's chat template refuses ({_said(error)}); it must"
                " be able to render them; change their roles, their order or their length",
                field="messages",
            ) from None
        if len(text) > MAX_CHARS:
            raise RequestError(
                f"got messages that render to {len(text)} characters; at most {MAX_CHARS} are"
                " allowed; shorten them",
                field="messages",
            )
        return text

    def _probe(self) -> None:
        """Renders short conversations, to find out at the start what the template lacks."""
        for roles in (["user"], ["system", "user", "assistant", "user"]):
            try:
                self._environment.render_template(
                    "chat",
                    **self._tokens,
                    messages=[{"role": role, "content": "a"} for role in roles],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                )
            except minijinja.TemplateError as error:
                if error.kind.startswith("Unknown") or error.kind == "OutOfFuel":
                    raise _unusable(error) from None
            except _RefusedError:
                continue


class _Edges:
    """The beginnings and the ends of special tokens' strings, short of the whole."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._beginnings = {text[:i] for text in texts for i in range(1, len(text))}
        self._ends = {text[i:] for text in texts for i in range(1, len(text))}
        self._max_len = max(map(len, texts), default=0)

    def find(self, text: str) -> Iterator[int]:
        """Yields the place of a character whose change keeps each edge of the text harmless.

        Text that ends like a special token begins could make one with what the template, or the
        next message, puts behind it; and the other way round. Space around is passed over, since
        templates trim.
        """
        start = len(text) - len(text.lstrip())
        end = len(text.rstrip())
        for num_chars in range(1, min(self._max_len, end - start + 1)):
            if text[end - num_chars : end] in self._beginnings:
                yield end - num_chars
            if text[start : start + num_chars] in self._ends:
                yield start + num_chars - 1


class _Mask:
    """Private characters that stand in for those of messages, during one rendering."""

    def __init__(self, tokenizer: Tokenizer, edges: _Edges, taken: set[str]) -> None:
        self._tokenizer = tokenizer
        self._edges = edges
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        spaces = (chr(code) for code in _RARE_SPACES if chr(code) not in taken)
        found = sorted(taken.intersection(_PYTHON_SPACES))
        self._private = dict(zip(found, spaces, strict=False))
        self._spaces = {ord(char): space for char, space in self._private.items()}

    def hide_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a copy with every string hidden but the role, which is one of `ROLES`.

        The message's own keys are what a template asks for by name, so their edges stay.
        """
        return {
            self._hide_whole(key): value if key == "role" else self.hide_all(value)
            for key, value in message.items()
        }

    def hide_all(self, value: Any) -> Any:
        """Returns a copy of the value with every string in it hidden, keys of mappings as well."""
        if isinstance(value, str):
            hidden = self._hide_whole(self._replace(value, [*self._edges.find(value)]))
            return hidden.translate(self._spaces) if self._spaces else hidden
        if isinstance(value, Mapping):
            return {self.hide_all(key): self.hide_all(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_all(entry) for entry in value]
        return value

    def restore(self, text: str) -> str:
        """Returns the text with the characters of the messages put back."""
        return text.translate({ord(p): char for char, p in self._private.items()})

    def _hide_whole(self, text: str) -> str:
        # Until none is left: one match may have covered the beginning of another.
        while places := self._tokenizer.find_special(text):
            text = self._replace(text, places)
        return text

    def _replace(self, text: str, places: list[int]) -> str:
        if not places:
            return text
        chars = list(text)
        for place in places:
            chars[place] = self._stand_in(text[place])
        return "".join(chars)

    def _stand_in(self, char: str) -> str:
        if char not in self._private:
            if (private := next(self._free, None)) is None:
                raise RequestError(
                    "got messages with all 65,534 characters of Unicode's last private area; one"
                    " must be free; remove some",
                    field="messages",
                )
            self._private[char] = private
        return self._private[char]


def _check_role(i: int, role: object) -> None:
    if role not in ROLES:
        raise RequestError(
            f"got role {role!r} in message {i}; a message has a role, one of {', '.join(ROLES)};"
            " change it",
            field="messages",
        )


def _strings(value: object, field: str, depth: int = 0) -> Iterator[str]:
    """Yields every string in the value; raises RequestError where JSON could not hold it."""
    if isinstance(value, str):
        check_text(value, field)
        yield value
    elif isinstance(value, Mapping | list | tuple) and depth < MAX_DEPTH:
        for entry in value:
            yield from _strings(entry, field, depth + 1)
            if isinstance(value, Mapping):
                yield from _strings(value[entry], field, depth + 1)
    elif value is not None and not isinstance(value, bool | int | float):
        raise RequestError(
            f"got a {type(value).__name__} {depth} levels deep in {field}; allowed is what JSON"
            f" has, at most {MAX_DEPTH} levels deep; change it",
            field=field,
        )


class _RefusedError(Exception):
    """The template called raise_exception."""


def _raise_exception(message: str = "") -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _is_iterable(value: object) -> bool:
    """None is not, and text and mappings are, of both kinds that jinja2 tells apart."""
    return isinstance(value, Iterable)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML; models were trained on plain JSON."""
    pair = None if separators is None else (separators[0], separators[1])
    try:
        return json.dumps(
            value, indent=indent, separators=pair, sort_keys=sort_keys, ensure_ascii=ensure_ascii
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise _RefusedError(f"tojson: {error}") from None


def _said(error: Exception) -> str:
    if isinstance(error, minijinja.TemplateError):
        return f"{error.detail or error.message}, line {error.line}"
    return str(error)


def _unusable(error: minijinja.TemplateError) -> ConfigError:
    return ConfigError(
        f"got a chat template that cannot be used ({_said(error)}); it must be a Jinja template"
        " of minijinja's dialect; mend the checkpoint's chat template"
    )
