"""A comparison's result as it stands in JSON, and what of an earlier one is kept in it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pallasite.models.errors import ConfigError

Result = dict[str, Any]

SAME = ("model_id", "threads", "ours", "machine")
"""What two results must share to stand in one table."""

MADE = ("command", "date")
"""What each point says of the run that measured it."""


def with_origin(result: Result) -> Result:
    """Returns a result whose points each say by which command they were measured, and when."""
    made = {name: result[name] for name in MADE}
    points = {name: made | point for name, point in result["points"].items()}
    return result | {"points": points}


def read(path: Path) -> Result:
    """Returns a result that was written earlier. Raises ConfigError where it is none."""
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict) or not {*SAME, *MADE, "points", "engines"} <= {*result}:
            raise ValueError
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"got {path.name!r}, which is no result of this benchmark; it must be one that --output"
            " wrote; name another"
        ) from error
    return with_origin(result)


def joined(earlier: Result, later: Result, order: Iterable[str]) -> Result:
    """Returns the later result with those points of the earlier one that it has not.

    Raises ConfigError where the two are not of the same model and kind of machine.
    """
    for name in SAME:
        if earlier[name] != later[name]:
            raise ConfigError(
                f"got an earlier result with another {name}; both must have the same; measure all"
                " points again"
            )
    points: Mapping[str, Any] = {**earlier["points"], **later["points"]}
    kept = {name: earlier[name] for name in ("bandwidth",) if name in earlier}
    return (
        kept
        | later
        | {
            "points": {name: points[name] for name in order if name in points},
            "engines": {**earlier["engines"], **later["engines"]},
        }
    )
