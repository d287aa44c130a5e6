"""Result rows, settings and jobs; this module is fast to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Settings of the checks.

    Attributes:
        device: ``cuda``, ``cpu`` or ``pretend``.
        small: Whether to use tiny shapes and few steps.
        lm: Name of the LM for the checks of methods, or ``None`` for the default.
        scratch: Folder for run folders and caches.
    """

    device: str
    small: bool
    lm: str | None
    scratch: Path


@dataclass
class Row:
    """The result of one check.

    Attributes:
        part: Part of the check.
        name: Name of the check.
        measured: Description of the result.
        expected: Description of the expected result, with the tolerance.
        ok: Whether the check passed; ``None`` if it was not run.
        seconds: Duration in seconds.
        error: Type and message of an exception, with the last line of this project in its stack.
        figures: Results as numbers.
    """

    part: str
    name: str
    measured: str = ""
    expected: str = ""
    ok: bool | None = True
    seconds: float = 0.0
    error: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A job for one process, which produces rows of a part."""

    part: str
    name: str
