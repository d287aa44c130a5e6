"""The LMs that stay loaded between calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_prompts.lm.reuse import KeptLMs, keep_lms

LMS = KeptLMs()


@contextmanager
def loaded() -> Iterator[None]:
    """Use the LMs of earlier calls, and keep those of this one."""
    with keep_lms(LMS) as kept, kept.one_run():
        yield


def free_lms() -> None:
    """Free the memory of the LMs that earlier calls loaded."""
    LMS.free()
