"""Errors for users: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Iterable

MOST_NAMES = 40
DEBUG = "LIGHTNING_PROMPTS_DEBUG"  # if set, errors are raised with their traceback


class UserError(Exception):
    """An error that the user can fix. The command line and notebooks print it in one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class UsageError(UserError):
    """A setting or option is wrong. The command line exits with code 2, and with code 1 after other errors."""


def check_installed(what: str, extra: str, *packages: str) -> None:
    """Raise if a package is missing that only some features need.

    Args:
        what: The feature.
        extra: The extra of this project that installs its packages.
        packages: Their names in Python.

    Raises:
        UserError: One is not installed; the message has the command that installs it.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{what} needs the package {name}; install it with: pip install 'lightning-prompts[{extra}]'"
            )


def in_one_line(error: BaseException) -> str:
    """The type and the message of an error, the message cut to 200 characters.

    >>> in_one_line(RuntimeError("no   kernel"))
    'RuntimeError: no kernel'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check_finite(name: str, value: float, least: float = 0.0, above: bool = False) -> None:
    """Raise unless a setting is a finite number that is large enough.

    Args:
        name: The setting.
        value: Its value.
        least: The smallest allowed value.
        above: Whether the value must be larger than ``least``.

    Raises:
        UserError: The value is too small, infinite or not a number.

    >>> check_finite("weight", 0.5)
    >>> check_finite("weight", float("nan"))
    Traceback (most recent call last):
    lightning_prompts.errors.UserError: weight must be a finite number of at least 0, got nan
    """
    if not (math.isfinite(value) and (value > least if above else value >= least)):
        raise UserError(f"{name} must be a finite number {'above' if above else 'of at least'} {least:g}, got {value}")


def check_at_least(name: str, value: int, least: int = 1) -> None:
    """Raise a `UserError` if a setting is smaller than allowed.

    >>> check_at_least("length", 1)
    >>> check_at_least("length", 0)
    Traceback (most recent call last):
    lightning_prompts.errors.UserError: length must be at least 1, got 0
    """
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")


def check_stop(name: str, stop: str) -> None:
    """Raise a `UserError` if a text cannot end where this regular expression matches.

    >>> check_stop("stop", "[.]")
    >>> check_stop("stop", "")
    Traceback (most recent call last):
    lightning_prompts.errors.UserError: stop is empty, and every text would be; leave it out
    """
    if not stop:
        raise UserError(f"{name} is empty, and every text would be; leave it out")
    try:
        re.compile(stop)
    except re.error as error:
        raise UserError(f"{name} {stop!r} is not a regular expression: {error}") from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to a mistyped one.

    Args:
        name: The given name.
        known: The valid names.
        count: The most names to suggest.

    Returns:
        ``"did you mean A, B?"``, or ``"known: A, B, ..."`` with at most `MOST_NAMES` names if none is close. The given
        name itself is never suggested.

    >>> nearest("lenght", ["length", "rank"])
    'did you mean length?'
    """
    names = [known_name for known_name in known if known_name != name]  # it can be valid in another place
    by_folded = {known_name.casefold(): known_name for known_name in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=count, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(by_folded[match] for match in close)}?"
    shown = names if len(names) <= MOST_NAMES else [*names[:MOST_NAMES], f"and {len(names) - MOST_NAMES} more"]
    return f"known: {', '.join(shown)}"
