"""Checked values of adapter_config.json, and the regular expressions among them."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable
from re import _parser  # type: ignore[attr-defined]  # what `re` itself parses with
from typing import Any

import numpy as np

from jlora.errors import AdapterError

CONFIG_NAME = "adapter_config.json"

# Bounds of what a file may make us do. An expression with 4 unbounded repeats (".*") in a row takes
# at most some 10 ms for the name of a module.
MAX_ENTRIES = 10_000
MAX_PATTERN_LENGTH = 4000
_MAX_NESTING = 60
_NAME_LENGTH = 64
_MAX_COST = 4 * _NAME_LENGTH**4
_LARGEST = float(np.finfo(np.float32).max)


@functools.lru_cache(maxsize=2 * MAX_ENTRIES)
def compiled(regex: str) -> re.Pattern[str]:
    """The expression, compiled once (the cache of `re` itself holds 512)."""
    return re.compile(regex)


def check_regex(shown: str, regex: str, key: str, adapter: str) -> None:
    """Raises for what is not an expression, or one that may take for ever to match."""
    if not isinstance(shown, str) or len(shown) > MAX_PATTERN_LENGTH:
        raise AdapterError(
            f"{adapter}: {key} holds {str(shown)[:60]!r}..., expected an expression of at most "
            f"{MAX_PATTERN_LENGTH} characters"
        )
    wrong = f"{adapter}: {key} holds {shown[:200]!r}, which is not a regular expression: "
    if _nesting(regex) > _MAX_NESTING:  # Python would recurse, to no good end
        raise AdapterError(f"{wrong}it is nested too deeply")
    try:
        cost = _cost(_parser.parse(regex))
        compiled(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{wrong}{error}") from error
    if cost > _MAX_COST:
        raise AdapterError(
            f"{adapter}: {key} holds {shown[:200]!r}, which may take for ever to match; expected "
            "nothing of variable width inside a repeat, no backward reference, and few unbounded "
            "repeats (.*) in a row"
        )


def _nesting(regex: str) -> int:
    """How many groups are open at once at most, if none of the parentheses is in a class."""
    depth = most = 0
    for character in re.sub(r"\\.", "", regex, flags=re.DOTALL):
        depth += (character == "(") - (character == ")")
        most = max(most, depth)
    return most


def _cost(parsed: Any) -> float:
    """About how many ways one match may have to try; infinite when it is exponential in the name.

    A repeat of what has one width and one way tries as many lengths as a name is long; anything
    else in a repeat can be divided in exponentially many ways.
    """
    total = 1.0
    for code, value in parsed:
        name = str(code)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            total *= _repeat_cost(*value)
        elif name == "BRANCH":
            costs = [_cost(one) for one in value[1]]
            total *= max(costs) if _exclusive(value[1]) else sum(costs)
        elif name == "ATOMIC_GROUP":
            total *= _cost(value)
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            total *= _cost(value[-1])
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            return math.inf
    return total


def _repeat_cost(least: int, most: int, body: Any) -> float:
    inside = _cost(body)
    if most <= 1:
        return inside + (least == 0)
    low, high = body.getwidth()
    if inside > 1 or low != high:
        return math.inf
    return min(int(most) - int(least) + 1, _NAME_LENGTH)


def _exclusive(branches: list[Any]) -> bool:
    """Whether at most one can match: plain words, none the beginning of another."""
    if not all(str(code) == "LITERAL" for one in branches for code, _ in one):
        return False
    words = sorted("".join(chr(value) for _, value in one) for one in branches)
    return not any(after.startswith(word) for word, after in itertools.pairwise(words))


def flag(value: Any, key: str, adapter: str) -> bool:
    """True, False or null."""
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{adapter}: {key}={value!r} must be true or false")
    return bool(value)


def positive(value: Any, key: str, adapter: str) -> int:
    """An integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{adapter}: {key}={value!r} must be an integer of at least 1")
    return value


def number(value: Any, key: str, adapter: str) -> float:
    """A finite number."""
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not numeric or not abs(value) <= _LARGEST:
        raise AdapterError(f"{adapter}: {key}={value!r} must be a finite number (in float32)")
    return float(value)


def token_ids(value: Any, key: str, adapter: str) -> tuple[int, ...]:
    """A list of token ids, none for null."""
    listed = [] if value is None else value
    if not isinstance(listed, (list, tuple)) or not all(
        type(one) is int and 0 <= one < 2**31 for one in listed
    ):
        raise AdapterError(f"{adapter}: {key}={short(value)} must be a list of token ids")
    return tuple(listed)


def names(value: Any, key: str, adapter: str) -> str | tuple[str, ...] | None:
    """A regular expression as it is, a list of names as a tuple."""
    if value is None:
        return None
    if isinstance(value, str):
        check_regex(value, value, key, adapter)
        return value
    return name_list(value, key, adapter)


def name_list(value: Any, key: str, adapter: str) -> tuple[str, ...]:
    """A list of names, none for null."""
    listed = [] if value is None else value
    if not isinstance(listed, (list, tuple, set)) or not all(
        isinstance(name, str) and name for name in listed
    ):
        raise AdapterError(f"{adapter}: {key}={short(value)} must be a string or a list of strings")
    _check_count(listed, key, adapter)
    return tuple(listed)


def patterns(
    value: Any,
    key: str,
    adapter: str,
    regex: Callable[[str], str],
    check: Callable[[Any, str, str], Any],
) -> dict[str, Any]:
    """A table of regular expressions and values; `regex` is what is matched for a key."""
    if value is not None and not isinstance(value, dict):
        raise AdapterError(
            f"{adapter}: {key}={short(value)} must be a table of modules and numbers"
        )
    _check_count(value or {}, key, adapter)
    for pattern in value or {}:
        check_regex(pattern, regex(pattern), key, adapter)
    return {
        pattern: check(one, f"{key}[{pattern!r}]", adapter)
        for pattern, one in (value or {}).items()
    }


def _check_count(listed: Iterable[Any], key: str, adapter: str) -> None:
    count = len(listed)  # type: ignore[arg-type]
    if count > MAX_ENTRIES:
        raise AdapterError(f"{adapter}: {key} has {count} entries, expected at most {MAX_ENTRIES}")


def short(value: Any) -> str:
    """The value for a message, cut when it is long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
