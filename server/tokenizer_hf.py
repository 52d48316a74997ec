"""Builds a tokenizer from a Hugging Face folder: tokenizer.json and the settings beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from pallasite.engine.errors import ConfigError
from pallasite.server.tokenizer_parts import TokenizerParts, added, unique

_SPACE = "\u2581"


def build_from_folder(folder: Path) -> TokenizerParts:
    """Builds the tokenizer of a Hugging Face folder.

    Reads tokenizer.json, and where they exist tokenizer_config.json, generation_config.json,
    config.json and chat_template.jinja. Raises ConfigError naming the file for one that is
    missing or damaged, and for a decoder of a kind that is not known.
    """
    encoder = _read_encoder(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json")
    bos = _token_id(encoder, settings, "bos_token")
    eos = _token_id(encoder, settings, "eos_token")
    special_tokens = {
        token_id: token
        for token_id, token in encoder.get_added_tokens_decoder().items()
        if token.special
    }
    prefix_ids, suffix_ids = _find_surroundings(encoder)
    if bos is not None and (adds_bos := settings.get("add_bos_token")) is not None:
        prefix_ids = unique([bos, *prefix_ids]) if adds_bos else _without(prefix_ids, bos)
    if eos is not None and (adds_eos := settings.get("add_eos_token")) is not None:
        suffix_ids = unique([*suffix_ids, eos]) if adds_eos else _without(suffix_ids, eos)
    is_byte_level, strips_leading_space = _read_decoder(encoder)
    return TokenizerParts(
        encoder=encoder,
        special_tokens=special_tokens,
        is_byte_level=is_byte_level,
        strips_leading_space=strips_leading_space,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        bos_token_id=bos,
        eos_token_id=eos,
        eos_token_ids=_read_ends(folder, encoder) or unique([eos]),
        chat_template=_read_chat_template(folder, settings),
    )


def _read_encoder(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ConfigError(
            "got a folder without tokenizer.json; a Hugging Face folder must have one; add it, or"
            " use a GGUF file"
        )
    try:
        encoder = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(
            f"got a tokenizer.json that cannot be read ({error}); it must be one that the"
            " tokenizers library wrote; download it again"
        ) from error
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"a {type(value).__name__}")
    return value


def _damaged(path: Path, got: str) -> ConfigError:
    return ConfigError(
        f"got a damaged {path.name} ({got}); it must hold one JSON object; download it again"
    )


def _token_id(encoder: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> int | None:
    """Returns the id of BOS or EOS, a control token from now on, if it was not one before."""
    setting = settings.get(name)
    text = setting.get("content") if isinstance(setting, dict) else setting
    if text is None:
        return None
    token_id = encoder.token_to_id(text) if isinstance(text, str) else None
    if token_id is None or not isinstance(text, str):
        raise ConfigError(
            f"got {name}={text!r} in tokenizer_config.json; it must be a token of tokenizer.json;"
            " mend one of the two"
        )
    token = encoder.get_added_tokens_decoder().get(token_id)
    if token is None or not token.special:
        encoder.add_special_tokens([added(text, is_special=True)])
    return token_id


def _read_ends(folder: Path, encoder: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that end an answer, of the generation settings or else of the config."""
    for name in ("generation_config.json", "config.json"):
        ends = _read_json(folder / name).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends]
        ids = tuple(end for end in ends if end is not None)
        for token_id in ids:
            if type(token_id) is not int or token_id < 0 or encoder.id_to_token(token_id) is None:
                raise ConfigError(
                    f"got eos_token_id={token_id!r} in {name}; it must be the id of a token of"
                    " tokenizer.json; mend one of the two"
                )
        if ids:
            return unique(ids)
    return ()


def _find_surroundings(
    encoder: tokenizers.Tokenizer,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what the tokenizer puts in front of a prompt and behind it."""
    bare = encoder.encode("a", add_special_tokens=False).ids
    whole = encoder.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise ConfigError(
        "got a post_processor in tokenizer.json that changes the prompt itself; it may only put"
        " tokens around it; use another tokenizer.json"
    )


def _without(ids: tuple[int, ...], token_id: int) -> tuple[int, ...]:
    return tuple(other for other in ids if other != token_id)


def _read_decoder(encoder: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Returns (is_byte_level, strips_leading_space), read off the library's decoder."""
    # The library's objects say what they are only in their pickled form, which is JSON.
    state = encoder.decoder.__getstate__() if encoder.decoder is not None else b"{}"
    steps = list(_flatten(json.loads(state)))
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return True, False
    strips = any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] >= 1)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
        if "type" in step
    )
    has_space = any(
        step.get("type") == "Replace" and step["pattern"] == {"String": _SPACE} for step in steps
    )
    if has_space or "Metaspace" in kinds:
        return False, strips
    raise ConfigError(
        f"got a decoder of {kinds} in tokenizer.json; known are ByteLevel, Metaspace and"
        " SentencePiece's Replace with ByteFallback; use another tokenizer.json"
    )


def _flatten(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _flatten(step)
    else:
        yield decoder


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Returns the folder's own template file, or the one in the settings (the default of many)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
