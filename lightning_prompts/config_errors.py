"""The parser's errors, which span many lines, as one."""

from __future__ import annotations


def one_line(message: str) -> str:
    """Placeholder."""
    return " ".join(message.split())
