"""The command line.

`main` is LightningCLI with this project's defaults; `commands` lists the other subcommands. Importing this package
imports neither torch nor Lightning, so that what needs neither is answered at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_prompts.cli.commands import run

if TYPE_CHECKING:
    from lightning_prompts.cli.main import ALWAYS, CALLBACK_DEFAULTS, TRAINER_DEFAULTS, PromptCLI, execute

__all__ = ["ALWAYS", "CALLBACK_DEFAULTS", "TRAINER_DEFAULTS", "PromptCLI", "execute", "run"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever `main` holds under this name
    """Import `main`, and with it Lightning, when one of its names is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lightning_prompts.cli import main

    return getattr(main, name)
