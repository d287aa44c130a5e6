"""One run of a study: configs trained and tested with one seed, in a folder of its own."""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import load_yaml, read_json, write_atomic

UNTRAINED = {"FixedPrompt", "FewShot", "ChainOfThought"}
METRICS, VALIDATION, SECONDS, RECORD = "metrics.json", "validation.json", "seconds.json", "run.json"


@dataclass(frozen=True)
class Run:
    """What is run, and where.

    Attributes:
        folder: The run folder.
        configs: Config files, each on top of the one before; the first names the method.
        seed: Of the split, the initial prompt and the order of batches.
        options: Further words of the command line.
        trained: Whether to fit before testing, where there is something to fit.
        checkpoint: ``best`` on validation or ``last``: which prompt is tested.
        validated: Whether what is tested is also measured on the validation set, which is what to choose by.
    """

    folder: str
    configs: tuple[str, ...]
    seed: int
    options: tuple[str, ...] = ()
    trained: bool = True
    checkpoint: str = "best"
    validated: bool = False

    @classmethod
    def from_json(cls, text: str) -> Run:
        """What `to_json` made."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "configs": tuple(fields["configs"]), "options": tuple(fields["options"])})

    def to_json(self) -> str:
        """All of it as text."""
        return json.dumps(asdict(self))

    @property
    def done(self) -> bool:
        """Whether everything that is asked for was measured."""
        names = (METRICS, VALIDATION) if self.validated else (METRICS,)
        return all((Path(self.folder) / name).is_file() for name in names)

    def check_record(self) -> None:
        """Raise if the folder holds a run of other settings, which would stand in the table for this one.

        Raises:
            UserError: The options or a config file are not those that the run was made with.
        """
        path = Path(self.folder) / RECORD
        if path.is_file() and read_json(path) != self._record():
            raise UserError(
                f"{self.folder} holds a run that was made with other options or another text of its configs; "
                "give another folder, or remove that one to run it again"
            )

    def measure(self, execute: Callable[[list[str]], None]) -> dict[str, float]:
        """Train (where there is something to train) and test, unless that was done before.

        Args:
            execute: Runs one command of ``lightning-prompts``; raises if it fails.

        Returns:
            The metrics, with ``budget/tokens``, ``budget/steps`` and ``seconds`` of the training.
        """
        if not self.done:
            self._execute(execute)
        return self.results()

    def results(self) -> dict[str, float]:
        """What a run that is done has left."""
        folder = Path(self.folder)
        costs = _read(folder / "budget.json") or {"tokens": 0.0, "steps": 0.0}
        return {
            **_read(folder / VALIDATION),
            **_read(folder / METRICS),
            **{f"budget/{name}": value for name, value in costs.items()},
            **_read(folder / SECONDS),
        }

    def _execute(self, execute: Callable[[list[str]], None]) -> None:
        folder = Path(self.folder)
        given = [word for config in self.configs for word in ("-c", config)]
        seeds = ["--seed_everything", str(self.seed), "--data.seed", str(self.seed), *self.options]
        words = [*given, *seeds, "--trainer.default_root_dir", self.folder]
        seconds = 0.0
        if self.trained and trains(Path(self.configs[0])):
            start = time.monotonic()
            execute(["fit", *words, "--overwrite", "true"])
            seconds = time.monotonic() - start
            words = ["-c", str(folder / "config.yaml"), "--ckpt_path", self.checkpoint]
        # Noted ahead of the metrics, which say that the run is done.
        write_atomic(folder / SECONDS, json.dumps({"seconds": seconds}))
        write_atomic(folder / RECORD, json.dumps(self._record()))
        if self.validated:
            execute(["validate", *words, "--verbose", "false"])
        execute(["test", *words, "--verbose", "false"])

    def _record(self) -> dict[str, Any]:
        """What must be the same for two runs to be the same."""
        texts = [hashlib.sha256(Path(config).read_bytes()).hexdigest() for config in self.configs]
        return {"configs": texts, "seed": self.seed, "options": list(self.options), "checkpoint": self.checkpoint}


def _read(path: Path) -> dict[str, float]:
    return read_json(path) or {}


def trains(config: Path) -> bool:
    """Whether the method that a config names has something to fit.

    Raises:
        UserError: The file is no YAML, or names no method.
    """
    content = load_yaml(config)
    model = content.get("model") if isinstance(content, dict) else None
    name = model.get("class_path") if isinstance(model, dict) else model
    if not isinstance(name, str):
        raise UserError(f"{config} names no method; give it a model with a class_path")
    return not _untrained(name)


def _untrained(name: str) -> bool:
    """Whether a class is one that trains nothing, or somebody's own that builds on one."""
    home, _, short = name.rpartition(".")
    if short in UNTRAINED or not home or home.startswith("lightning_prompts"):
        return short in UNTRAINED
    from lightning_prompts.methods import FixedPrompt  # seconds, which most studies need not spend

    try:
        found = getattr(importlib.import_module(home), short)
    except Exception:  # noqa: BLE001 - of any kind: the run itself says in one line what is wrong
        return False
    return isinstance(found, type) and issubclass(found, FixedPrompt)
