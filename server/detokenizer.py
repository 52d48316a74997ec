"""Token ids to text while they arrive, with stop strings found and cut.

It knows bytes and strings, not why tokens end: the caller tells the engine to stop on a match.
"""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pallasite.engine.errors import RequestError
from pallasite.server.tokenizer import Tokenizer
from pallasite.server.tokenizer_parts import check_text


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """What some tokens added to the text.

    Attributes:
        text: characters that are final; those of all deltas, joined, are the whole text.
        matched: the stop string that these tokens completed, or None.
        num_tokens: how many of the pushed ids belong to the completion: all of them, or those up
            to and including the one that completed the stop string.
    """

    text: str
    matched: str | None
    num_tokens: int


class Detokenizer:
    """One completion's text.

    The joined deltas equal `tokenizer.decode` of all ids, with the space that it takes from the
    front of a text where this one goes on with another; cut at the stop string that is complete
    first (reading character by character; the longest of those that end there), before it or,
    with `includes_stop`, behind it. Half a character is never emitted, and neither is text that
    may be the beginning of a stop string: both wait for what follows, or for `finish`.

    Each token costs time in proportion to its own text, whatever came before and however many
    stop strings there are (Aho and Corasick 1975).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        includes_stop: bool,
        skips_special: bool,
        *,
        continues_text: bool = False,
    ) -> None:
        """Raises RequestError naming `stop` for an empty stop string or one with no UTF-8 form."""
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids if skips_special else frozenset()
        self._includes_stop = includes_stop
        self._matcher = _StopMatcher(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_space = tokenizer.strips_leading_space and not continues_text
        self._is_done = False

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Takes the next ids. Once a stop string has matched, further ids belong to nothing.

        Raises ValueError for an id outside the vocabulary.
        """
        if self._is_done:
            return TextDelta(text="", matched=None, num_tokens=0)
        released = []
        for i, token_id in enumerate(ids):
            if token_id in self._skipped_ids:
                continue
            text, matched = self._advance(self._decode(self._tokenizer.token_bytes(token_id)))
            released.append(text)
            if matched is not None:
                return TextDelta(text="".join(released), matched=matched, num_tokens=i + 1)
        return TextDelta(text="".join(released), matched=None, num_tokens=len(ids))

    def finish(self) -> TextDelta:
        """Releases what was held back. Bytes of half a character become U+FFFD."""
        if self._is_done:
            return TextDelta(text="", matched=None, num_tokens=0)
        text, matched = self._advance(self._decoder.decode(b"", final=True))
        self._is_done = True
        if matched is None:
            text += self._matcher.held()
        return TextDelta(text=text, matched=matched, num_tokens=0)

    def _decode(self, raw: bytes) -> str:
        chars = self._decoder.decode(raw)
        # ED A0 to ED BF begin a surrogate, no character; the decoder waits for its third byte.
        pending = self._decoder.getstate()[0]
        if len(pending) == 2 and pending[0] == 0xED and pending[1] >= 0xA0:
            chars += self._decoder.decode(b"", final=True)
        return chars

    def _advance(self, chars: str) -> tuple[str, str | None]:
        if chars and self._strips_space:
            self._strips_space = False
            chars = chars.removeprefix(" ")
        text, matched = self._matcher.push(chars)
        if matched is not None:
            self._is_done = True
            if self._includes_stop:
                text += matched
        return text, matched


class _Node:
    """A beginning of one or more stop strings, the longest that the text now ends with.

    Attributes:
        beginning: its characters are the first `depth` of this stop string.
        depth: how many characters that is.
        next: the node for each further character.
        fallback: the node of the longest proper suffix that is a beginning too.
        match: the longest stop string that the text ends with here, or None.
    """

    __slots__ = ("beginning", "depth", "fallback", "match", "next")

    def __init__(self, beginning: str, depth: int) -> None:
        self.beginning = beginning
        self.depth = depth
        self.next: dict[str, _Node] = {}
        self.fallback: _Node | None = None
        self.match: str | None = None


class _StopMatcher:
    """Finds the stop string that is complete first, over text in pieces."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._node = self._root = _Node("", 0)
        for text in stop:
            if not text:
                raise RequestError(
                    "got an empty stop string; each must have at least one character; remove it",
                    field="stop",
                )
            check_text(text, "stop")
            node = self._root
            for i, char in enumerate(text):
                node = node.next.setdefault(char, _Node(text, i + 1))
            node.match = text
        self._link()

    def push(self, chars: str) -> tuple[str, str | None]:
        """Returns the text that can be no part of a match any more, and the match, if any."""
        if not self._root.next:
            return chars, None
        held, node = self._node, self._node
        for i, char in enumerate(chars):
            while char not in node.next and node.fallback is not None:
                node = node.fallback
            node = node.next.get(char, self._root)
            if node.match is not None:
                self._node = node
                return _join(held, chars, held.depth + i + 1 - len(node.match)), node.match
        self._node = node
        return _join(held, chars, held.depth + len(chars) - node.depth), None

    def held(self) -> str:
        """Returns the text that was held back."""
        return self._node.beginning[: self._node.depth]

    def _link(self) -> None:
        """Sets each node's fallback and match, shorter beginnings first."""
        waiting = deque([self._root])
        while waiting:
            node = waiting.popleft()
            for char, child in node.next.items():
                other = node.fallback
                while other is not None and char not in other.next:
                    other = other.fallback
                child.fallback = self._root if other is None else other.next[char]
                child.match = child.match or child.fallback.match
                waiting.append(child)


def _join(held: _Node, chars: str, num_chars: int) -> str:
    """Returns the first characters of what was held and what came; no more than those is built."""
    if num_chars <= held.depth:
        return held.beginning[:num_chars]
    return held.beginning[: held.depth] + chars[: num_chars - held.depth]
