"""Make a frozen language model better at a task by optimising the prompt, never the weights.

`fit` trains a prompt, `compare` compares methods, and `load` opens a run. Names are imported when they are first used,
because PyTorch and Lightning take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prompts.api import Comparison, PromptRun, compare, fit, free_lms, load
    from lightning_prompts.datamodules import QuestionAnswer
    from lightning_prompts.errors import UserError
    from lightning_prompts.lm import LMConfig

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "LMConfig",
    "PromptRun",
    "QuestionAnswer",
    "UserError",
    "__version__",
    "compare",
    "fit",
    "free_lms",
    "load",
]

_MODULES = {"LMConfig": "lm", "QuestionAnswer": "datamodules", "UserError": "errors"}  # all others are in `api`


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module holds under this name
    """Import a name from its module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
    globals()[name] = value  # so that this happens once
    return value
