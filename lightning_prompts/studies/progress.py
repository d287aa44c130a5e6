"""What is seen of a sweep while it runs: a bar, and each failure in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_prompts.studies.runs import Run


class Watch(tune.Callback):  # type: ignore[misc]  # Ray has no types
    """Moves a bar and keeps the errors.

    Args:
        total: How many runs there are.
        console: Where to show it.
    """

    def __init__(self, total: int, console: Console) -> None:
        """Nothing is done yet."""
        self.errors: dict[str, str] = {}
        columns = TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("runs", total=total)

    def __enter__(self) -> Watch:
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray notes down its callbacks; this one is of no use to another process."""
        return (tune.Callback, ())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
        """A run came to its end, well or not."""
        self._end(trial, str((trial.last_result or {}).get("error", "")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401
        """A worker died."""
        cause = " ".join(str(trial.get_error() or "the worker died").split())
        self._end(trial, cause[:300])

    def _end(self, trial: Any, error: str) -> None:  # noqa: ANN401
        folder = Run.from_json(trial.config["run"]).folder
        if error:
            self.errors[folder] = error
            place = "/".join(Path(folder).parts[-2:])
            self.bar.console.print(f"{place}: {error}", highlight=False, markup=False, soft_wrap=True)
        self.bar.advance(self.task)
