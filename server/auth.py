"""API keys: which tenant a call's key belongs to. Knows no protocol."""

import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from pallasite.engine.errors import ConfigError

_MIN_KEY_LEN = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[\x21-\x7e]{{{_MIN_KEY_LEN},512}}")
_MAX_FILE_BYTES = 1 << 20


class ApiKeys:
    """The keys that a server takes, each of one tenant. Without any, every caller is tenant ""."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """Takes key by tenant name. Raises ConfigError for a name or key that cannot be one."""
        owner: dict[str, str] = {}
        for name, key in keys.items():
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"got {name[:80]!r} as the name of an API key; allowed are 1 to 64 letters,"
                    " digits, '.', '_' and '-'; rename it"
                )
            if not _KEY.fullmatch(key):
                raise ConfigError(
                    f"got an API key of {len(key)} characters for {name!r}; allowed are"
                    f" {_MIN_KEY_LEN} to 512 printable ASCII characters without spaces; make a"
                    " longer random one"
                )
            if key in owner:
                raise ConfigError(
                    f"got the same API key for {owner[key]!r} and {name!r}; each name must have"
                    " its own; change one"
                )
            owner[key] = name
        self._names = tuple(keys)
        self._keys = tuple(key.encode() for key in keys.values())

    @property
    def are_needed(self) -> bool:
        """Whether a caller must show a key."""
        return bool(self._keys)

    def tenant(self, authorization: str | bytes | None) -> str | None:
        """The tenant that an Authorization value (`Bearer KEY`) names, or None for nobody.

        Every key is compared in constant time, so that the time taken tells neither how much of a
        key was right nor whose it was.
        """
        if not self._keys:
            return ""
        value = authorization or b""
        if isinstance(value, str):
            value = value.encode(errors="replace")
        scheme, _, shown = value.partition(b" ")
        tenant = None
        for name, key in zip(self._names, self._keys, strict=True):
            if hmac.compare_digest(key, shown.strip()):
                tenant = name
        return tenant if scheme.lower() == b"bearer" else None


def load_keys(path: Path) -> dict[str, str]:
    """Reads a file of API keys: one `NAME KEY` a line; blank lines and `#` comments are left out.

    Raises ConfigError where it cannot be read so; the message shows the line's number, no key.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"got a file of API keys that cannot be read ({type(error).__name__}); it must be UTF-8"
            " text; check its name and rights"
        ) from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(
            f"got a file of API keys over {_MAX_FILE_BYTES} bytes; that is the limit; shorten it"
        )
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise ConfigError(
                f"got {len(words)} words in line {number} of the file of API keys; allowed is"
                " NAME KEY; mend the line"
            )
        if words[0] in keys:
            raise ConfigError(
                f"got the name {words[0][:80]!r} twice in the file of API keys; each must have one"
                " key; rename one"
            )
        keys[words[0]] = words[1]
    if not keys:
        raise ConfigError("got a file of API keys without any; it must hold one; add NAME KEY")
    return keys
