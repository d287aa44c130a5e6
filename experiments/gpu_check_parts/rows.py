"""Rows of the result, and what a piece of work is told; nothing here takes long to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """What is checked where.

    Attributes:
        device: ``cuda``, ``cpu`` or ``pretend``.
        small: Tiny shapes and few steps.
        lm: The LM that methods train a prompt for: a local folder, or ``None`` to choose.
        scratch: A folder for run folders and caches.
    """

    device: str
    small: bool
    lm: str | None
    scratch: Path


@dataclass
class Row:
    """One line of the result.

    Attributes:
        part: Of the check.
        name: What was checked.
        measured: In words.
        expected: In words, with the tolerance.
        ok: ``None`` where nothing was checked.
        seconds: How long it took.
        error: Exception, message, and the last line of the project that it came through.
        figures: The numbers.
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
    """A piece of work for one process: some rows of a part."""

    part: str
    name: str
