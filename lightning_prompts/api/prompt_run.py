"""A run of a method: its prompt, its results, and what can be done with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch.loggers import Logger

from lightning_prompts.api.display import run_html, run_text, split_and_metric
from lightning_prompts.api.loaded_lms import loaded
from lightning_prompts.datamodules import Mixture, QuestionAnswer, TextDataModule
from lightning_prompts.datamodules.base import SourceRow
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.export.command import FORMATS
from lightning_prompts.export.command import main as export_command
from lightning_prompts.export.run import RestoredRun, open_run
from lightning_prompts.files import write_atomic
from lightning_prompts.lm import KeyValues, Prompt
from lightning_prompts.methods import FixedPrompt, PromptMethod
from lightning_prompts.runs import names
from lightning_prompts.runs.launcher import execute_here
from lightning_prompts.runs.reader import Run, check_run_folder, saved_checkpoint
from lightning_prompts.runs.record import check_writable

if TYPE_CHECKING:
    import pandas as pd
EXPORT_OPTIONS = {"examples", "base", "overwrite", "push", "private"}


@dataclass(frozen=True)
class PromptRun:
    """A run of a method: its prompt, its results, and what can be done with them.

    Args:
        folder: The run folder.
        checkpoint: Which prompt counts: ``best`` on validation, or ``last``.
    """

    folder: Path
    checkpoint: str = "best"

    def test(self, logger: Logger | Sequence[Logger] = ()) -> pd.DataFrame:
        """Measure the prompt on the test sets; see `metrics`.

        Args:
            logger: Loggers that get the metrics, such as those that were given to `fit`.
        """
        loggers = [logger] if isinstance(logger, Logger) else list(logger)
        place = ["--trainer.default_root_dir", str(self.folder), "--verbose", "false"]
        with loaded():
            execute_here(
                ["test", "-c", str(self.folder / names.CONFIG), *self._trained(), *place], more_loggers=loggers
            )
        return self.metrics

    def answer(
        self, questions: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | pd.DataFrame
    ) -> pd.DataFrame:
        """Answer new questions with the prompt.

        Args:
            questions: Texts for the field ``question``; or dicts, or a DataFrame, with all fields of the template.

        Returns:
            One row per question: ``question`` and ``answer``.

        Raises:
            UserError: A field of the template is missing, or each question has its own template or classes.
        """
        import pandas as pd

        given: Any = [questions] if isinstance(questions, str | Mapping) else questions
        given = given.to_dict("records") if isinstance(given, pd.DataFrame) else list(given)
        with loaded():
            restored, data = self._restored()
            found = {example.labels for example in data.examples("test")}
            if isinstance(data, Mixture) or len(found) > 1:
                raise UserError(
                    f"the questions of {type(data).__name__} have templates or classes of their own; use "
                    "lightning-prompts predict"
                )
            (known,) = found
            name = data.question if isinstance(data, QuestionAnswer) else "question"
            fields = [
                {**one, "question": one[name]} if isinstance(one, Mapping) and name in one else one for one in given
            ]
            fields = [one if isinstance(one, Mapping) else {"question": one} for one in fields]
            examples = [
                data.render(SourceRow({**one, "answer": None}, f"question {number}", labels=known))
                for number, one in enumerate(fields, start=1)
            ]
            size = data.eval_batch_size
            batches = [examples[start : start + size] for start in range(0, len(examples), size)]
            with torch.no_grad():
                rows = [row for batch in batches for row in restored.method.evaluate_batch(batch)]
        return pd.DataFrame([{"question": row["question"], "answer": row["generated"]} for row in rows])

    @cached_property
    def prompt(self) -> str | Prompt:
        """The prompt: a text, or vectors ``[P, D]``, or keys and values, in float32 on the CPU.

        Raises:
            UserError: The method writes a prompt for each question.
        """
        with loaded():
            restored, _ = self._restored()
            method = restored.method
            text = method.text if isinstance(method, FixedPrompt) else method.prompt_text()
            if text is None and type(method).prompt_for is not PromptMethod.prompt_for:
                raise UserError(f"{type(method).__name__} writes a prompt for each question; see predictions")
            with torch.no_grad():
                found = method.current_prompt() if text is None else text
        if isinstance(found, KeyValues):
            return KeyValues.unflatten(found.flatten().detach().cpu(), found.widths)
        return found.detach().float().cpu() if isinstance(found, torch.Tensor) else found

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics of `test`: one row per test set."""
        import pandas as pd

        table: dict[str, dict[str, float]] = {}
        for name, value in Run(self.folder).metrics.items():
            split, metric = split_and_metric(name)
            if split.startswith("test"):
                table.setdefault(split, {})[metric] = value
        found = pd.DataFrame.from_dict(table, orient="index")
        return found.astype({"examples": int}) if "examples" in found and found["examples"].notna().all() else found

    @property
    def predictions(self) -> pd.DataFrame:
        """The answers of `test`: one row per test question."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in Run(self.folder).predictions or []])

    @property
    def curves(self) -> pd.DataFrame:
        """What training logged: one row per step, one column per metric."""
        import pandas as pd

        return pd.DataFrame(Run(self.folder).curves).sort_index()

    def export(self, format: str | None = None, out: str | Path | None = None, **options: object) -> Path:
        """Write the prompt for other programs, and check the files by scoring.

        Args:
            format: ``peft``, ``vllm``, ``safetensors``, ``npy`` or ``text``; by default ``text`` for a text, and
                ``peft`` for other prompts.
            out: The folder to write; by default RUN/export/FORMAT.
            options: Options of ``lightning-prompts export``, such as ``base="models/base"``.

        Returns:
            The folder.

        Raises:
            UserError: The format does not support the prompt, or scores differ.
        """
        if format is None:
            format = "text" if isinstance(self.prompt, str) else "peft"
        if format not in FORMATS:
            raise UserError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
        if unknown := options.keys() - EXPORT_OPTIONS:
            raise UserError(f"unknown option {min(unknown)!r}; {nearest(min(unknown), EXPORT_OPTIONS)}")
        place = Path(out) if out is not None else self.folder / "export" / format
        chosen = {name: value for name, value in options.items() if value is not None and value is not False}
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()]
        with loaded():
            export_command(
                [str(self.folder), "--format", format, "--out", str(place), "--checkpoint", self.checkpoint, *given]
            )
        return place

    def save(self, folder: str | Path) -> PromptRun:
        """Copy the run folder, and return the copy.

        Raises:
            UserError: The folder exists, or cannot be made.
        """
        place = Path(folder)
        if place.exists():
            raise UserError(f"{place} exists; give another folder, or remove it")
        check_writable(place)
        shutil.copytree(self.folder, place)
        config, data = place / names.CONFIG, self.folder / "data"
        root = yaml.compose(config.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for node in _scalars(root):  # the copy has its own rows
            node.value = node.value.replace(str(data.absolute()), str((place / "data").absolute()))
        for node in _scalars(_value(_value(root, "trainer"), "default_root_dir")):
            node.tag, node.value = "tag:yaml.org,2002:str", str(place)
        write_atomic(config, yaml.serialize(root, Dumper=yaml.SafeDumper, allow_unicode=True))
        return PromptRun(place, self.checkpoint)

    def _restored(self) -> tuple[RestoredRun, TextDataModule]:
        """Load the LM as the run had it, and the prompt."""
        restored = open_run(self.folder, self.checkpoint, exact=False)
        device = restored.trainer.strategy.root_device
        restored.restore()
        restored.method.to(device)  # a Trainer moves its method to the CPU in the end, but for the kept LM
        assert isinstance(restored.data, TextDataModule)
        return restored, restored.data

    def _trained(self) -> list[str]:
        if (self.folder / names.CHECKPOINTS).is_dir():
            return ["--ckpt_path", self.checkpoint]
        if (self.folder / names.BUDGET).exists():
            raise UserError(f"{self.folder} holds no checkpoint, as enable_checkpointing was false")
        return []

    def _repr_html_(self) -> str:
        """The run as a notebook shows it."""
        return run_html(Run(self.folder))

    def __repr__(self) -> str:
        """The run in one line."""
        return run_text(Run(self.folder))


def _scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """The single values in a YAML document, and the keys of its mappings."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif node is not None:
        for item in node.value:
            for each in item if isinstance(item, tuple) else (item,):
                yield from _scalars(each)


def _value(node: yaml.Node | None, name: str) -> yaml.Node | None:
    """The value of a key; ``None`` without it."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def load(folder: str | Path) -> PromptRun:
    """Open a run folder that `fit`, `PromptRun.save` or the command line wrote.

    Raises:
        UserError: The folder is no run folder.
    """
    place = Path(folder)
    check_run_folder(place)
    return PromptRun(place, best_or_last(place))


def best_or_last(folder: Path) -> str:
    """The checkpoint that counts: ``best``, or ``last`` of a run that has no best one."""
    saved = saved_checkpoint(folder)
    return saved.stem if saved else "best"
