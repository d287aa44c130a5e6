"""One run of a sweep, inside a worker of Ray: what it prints goes to a file, what goes wrong becomes one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from lightning_prompts.errors import UserError
from lightning_prompts.studies.runs import Run

OUTPUT = "output.txt"


class Trial(tune.Trainable):  # type: ignore[misc]  # Ray has no types
    """A run as Ray Tune wants it: one step, on the worker's main thread, where signals are heard."""

    def setup(self, config: dict[str, Any]) -> None:
        """Keep what to run."""
        self.given = Run.from_json(config["run"])
        self.place = config["place"]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The run folder is all there is to keep."""

    def step(self) -> dict[str, Any]:
        """Run it; ``error`` is empty if all is well."""
        return {"error": attempt(self.given, self.place), "done": True}


def attempt(run: Run, place: str) -> str:
    """Do a run.

    Args:
        run: The run.
        place: The folder that relative paths in its configs start from.

    Returns:
        What went wrong, in one line; empty if all is well.
    """
    output = Path(run.folder) / OUTPUT
    try:
        os.chdir(place)
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{error.filename}: {error.strerror}; every machine of the cluster must see the same folders"
    with output.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            from lightning_prompts import cli
            from lightning_prompts.cli import main  # noqa: F401 - import Lightning before the clock starts

            run.measure(partial(_execute, cli.run))
        except UserError as error:
            return str(error)
        except _CommandError:
            pass  # said so in the file
        except SystemExit as error:
            if not error.code:
                return "ended too early"
        except Exception as error:  # noqa: BLE001 - one run's failure is not the sweep's
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            return ""
    return _last_error(output)


class _CommandError(Exception):
    """A command has failed, and has told why."""


def _execute(command: Callable[[list[str]], int], words: list[str]) -> None:
    if command(words):
        raise _CommandError


def _last_error(output: Path) -> str:
    """The line in which a command told what is wrong."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else f"failed without a word; see {output}"
