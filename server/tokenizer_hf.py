"""Builds a tokenizer from a Hugging Face folder: tokenizer.json, and the settings beside it.

Older folders have tokenizer.model alone, SentencePiece's own file.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from pallasite.engine.errors import ConfigError
from pallasite.server.sentencepiece import Pieces, PieceType, build_encoder, splits_of_unused
from pallasite.server.sentencepiece_file import SentencePieceModel, read_model
from pallasite.server.tokenizer_parts import SPACE, TokenizerParts, added, unique

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def build_from_folder(folder: Path) -> TokenizerParts:
    """Builds the tokenizer of a Hugging Face folder.

    Reads tokenizer.json, or else tokenizer.model with added_tokens.json, and where they exist
    tokenizer_config.json, special_tokens_map.json for what that leaves out, generation_config.json,
    config.json and the chat template's file. Raises ConfigError naming the file for one that is
    missing or damaged, and for a decoder of a kind that is not known.
    """
    settings = _read_settings(folder)
    opens_with_space = False
    splits: dict[int, tuple[int, ...]] = {}
    if (folder / "tokenizer.json").is_file():
        encoder = _read_encoder(folder / "tokenizer.json")
        is_byte_level, strips_leading_space = _read_decoder(encoder)
    elif (folder / "tokenizer.model").is_file():
        model = read_model(folder / "tokenizer.model")
        is_byte_level, strips_leading_space = False, model.adds_space
        settings = _model_settings(model) | settings
        # Text behind a special token had the space in front too, until it was called a mistake.
        opens_with_space = model.adds_space and settings["legacy"] is False
        encoder = build_encoder(
            model.pieces, puts_space_in_front=model.adds_space and not opens_with_space
        )
        splits = splits_of_unused(model.pieces)
        _add_tokens(encoder, model.pieces, settings, _read_json(folder / "added_tokens.json"))
    else:
        raise ConfigError(
            "got a folder without tokenizer.json and without tokenizer.model; a Hugging Face"
            " folder must have one of them; add it, or use a GGUF file"
        )
    bos = _token_id(encoder, settings, "bos_token")
    eos = _token_id(encoder, settings, "eos_token")
    ends = _read_ends(folder, encoder) or unique([eos])
    for token_id in encoder.get_added_tokens_decoder().keys() & set(ends):
        _make_special(encoder, token_id)
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
    return TokenizerParts(
        encoder=encoder,
        opens_with_space=opens_with_space,
        splits=splits,
        special_tokens=special_tokens,
        is_byte_level=is_byte_level,
        strips_leading_space=strips_leading_space,
        prefix_ids=prefix_ids,
        suffix_ids=suffix_ids,
        bos_token_id=bos,
        eos_token_id=eos,
        eos_token_ids=ends,
        chat_template=_read_chat_template(folder, settings),
    )


def _read_encoder(path: Path) -> tokenizers.Tokenizer:
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


def _model_settings(model: SentencePieceModel) -> dict[str, Any]:
    """Returns what tokenizer_config.json need not say beside a tokenizer.model."""
    texts = model.pieces.texts
    return {
        "bos_token": None if model.bos_id is None else texts[model.bos_id],
        "eos_token": None if model.eos_id is None else texts[model.eos_id],
        "add_bos_token": True,
        "legacy": True,
    }


def _add_tokens(
    encoder: tokenizers.Tokenizer,
    pieces: Pieces,
    settings: dict[str, Any],
    added_ids: dict[str, Any],
) -> None:
    """Adds the tokens that the folder lists beside its model, and makes control pieces special."""
    tokens = {
        token_id: added(text, is_special=True)
        for token_id, text in enumerate(pieces.texts)
        if pieces.types[token_id] == PieceType.CONTROL
    }
    special_texts = {_content(settings.get(name)) for name in _NAMED_TOKENS}
    for text, token_id in added_ids.items():
        if type(token_id) is not int:
            raise _misplaced(text, token_id, "added_tokens.json")
        tokens[token_id] = added(text, is_special=text in special_texts)
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict) or not all(isinstance(x, dict) for x in listed.values()):
        raise _damaged("tokenizer_config.json", "added_tokens_decoder is no map of tokens")
    for key, setting in listed.items():
        text = setting.get("content")
        if not isinstance(text, str) or not key.isdecimal():
            raise _misplaced(text, key, "tokenizer_config.json")
        token_id = int(key)
        is_special = setting.get("special") is True
        if not is_special and token_id < len(pieces.types):
            continue  # The model's own, found as the model finds it.
        tokens[token_id] = tokenizers.AddedToken(
            text,
            special=is_special,
            lstrip=setting.get("lstrip") is True,
            rstrip=setting.get("rstrip") is True,
            normalized=False,
        )
    by_id = sorted(tokens.items())
    encoder.add_tokens([token for _, token in by_id if token.content])
    for token_id, token in by_id:
        if encoder.token_to_id(token.content) != token_id:
            raise _misplaced(token.content, token_id, "the folder's files")


def _misplaced(text: object, token_id: object, name: str) -> ConfigError:
    return ConfigError(
        f"got added token {text!r} with id {token_id!r} in {name}; added tokens must have the"
        " model's ids, or those that follow them without a gap; mend the folder"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path.name, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path.name, f"a {type(value).__name__}")
    return value


def _read_settings(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json's object, with special_tokens_map.json's tokens under it."""
    tokens = _read_json(folder / "special_tokens_map.json")
    named = {name: token for name, token in tokens.items() if name in _NAMED_TOKENS}
    return named | _read_json(folder / "tokenizer_config.json")


def _damaged(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"got a damaged {name} ({got}); it must hold one JSON object; download it again"
    )


def _token_id(encoder: tokenizers.Tokenizer, settings: dict[str, Any], name: str) -> int | None:
    """Returns the id of BOS or EOS, a control token from now on, if it was not one before."""
    text = _content(settings.get(name))
    if text is None:
        return None
    token_id = encoder.token_to_id(text) if isinstance(text, str) else None
    if token_id is None or not isinstance(text, str):
        raise ConfigError(
            f"got {name}={text!r} in tokenizer_config.json or special_tokens_map.json; it must be a"
            " token of the tokenizer; mend one of them"
        )
    _make_special(encoder, token_id)
    return token_id


def _content(setting: Any) -> Any:
    """Returns a token's text of a setting that is the text, or the token's own settings."""
    return setting.get("content") if isinstance(setting, dict) else setting


def _make_special(encoder: tokenizers.Tokenizer, token_id: int) -> None:
    token = encoder.get_added_tokens_decoder().get(token_id)
    text = encoder.id_to_token(token_id)
    if token is None or not token.special:
        strips = {} if token is None else {"lstrip": token.lstrip, "rstrip": token.rstrip}
        encoder.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False, **strips)]
        )


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
        step.get("type") == "Replace" and step["pattern"] == {"String": SPACE} for step in steps
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
    if template is None:
        # Where models of text and images have it.
        template = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None
