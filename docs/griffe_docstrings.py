"""Adapts docstrings to the API pages of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.M)  # from the prompt to the next empty line


class Docstrings(griffe.Extension):
    """Shows doctests as code, and leaves out docstrings of constructors, whose arguments the class explains."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was collected."""
        if obj.docstring is None:
            return
        obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
        if obj.name == "__init__" and "Args:" not in obj.docstring.value:
            obj.docstring = None
