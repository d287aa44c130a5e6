"""The Python API: `fit`, `load`, `compare`.

Each call does what a command of the command line does, with the same settings and the same results. Errors are
`UserError`s with the same text. The LM stays loaded between calls.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prompts.cli.classes import settings_of, subclasses
from lightning_prompts.datamodules import Mixture, QuestionAnswer, TextDataModule
from lightning_prompts.datamodules.base import SourceRow
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.export.command import FORMATS
from lightning_prompts.export.command import main as export_command
from lightning_prompts.export.run import RestoredRun, open_run
from lightning_prompts.files import write_atomic
from lightning_prompts.lm import LMConfig, Prompt
from lightning_prompts.lm.reuse import KeptLMs, keep_lms
from lightning_prompts.methods import FixedPrompt, PromptMethod
from lightning_prompts.methods.settings import CLASS, SETTINGS, as_plain
from lightning_prompts.runs import names
from lightning_prompts.runs.launcher import RunSpec, attempt, execute_here, method_of, words
from lightning_prompts.runs.reader import Run, check_run_folder, saved_checkpoint
from lightning_prompts.runs.record import clear

if TYPE_CHECKING:
    import pandas as pd

Method: TypeAlias = str | Path | PromptMethod
Data: TypeAlias = Any  # a datamodule, the name of one, a YAML file, or rows: dicts, a DataFrame or a Dataset

# Short names beside those of the classes.
METHODS = {
    "static": "FixedPrompt",
    "few_shot": "FewShot",
    "chain_of_thought": "ChainOfThought",
    "soft_prompt": "SoftPromptTuning",
    "prefix": "PrefixTuning",
    "relaxed": "RelaxedPromptTuning",
    "hard_search": "HardPromptSearch",
    "refiner": "RefinerTuning",
    "reinforce": "ReinforceRefiner",
    "ape": "Ape",
    "gepa": "Gepa",
    "capo": "Capo",
    "demonstration_search": "DemonstrationSearch",
    "dln": "DeepLanguageNetwork",
    "lora": "LoraTuning",
    "scratch": "ScratchTransformer",
}
ROWS = ("train", "val", "test", "predict")  # settings of `QuestionAnswer` that name a file, or hold rows in Python
EXPORT_OPTIONS = {"examples", "base", "overwrite", "push", "private"}
_lms = KeptLMs()


@contextmanager
def _loaded() -> Iterator[None]:
    """Use the LMs of earlier calls, and keep those of this one."""
    with keep_lms(_lms) as kept:
        yield
        kept.drop_unused()


def free_lms() -> None:
    """Free the memory of the LMs that earlier calls loaded."""
    _lms.lms.clear()


def fit(
    method: Method,
    data: Data,
    *,
    lm: str | LMConfig | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    callbacks: L.Callback | Sequence[L.Callback] | None = None,
    logger: Logger | Sequence[Logger] | bool | None = None,
    **settings: object,
) -> PromptRun:
    """Train a prompt, as ``lightning-prompts fit`` does with the same settings.

    Ctrl-C stops the training and keeps what was learned so far.

    Args:
        method: A short name such as ``"soft_prompt"``, the name of a class, a YAML file, or a method.
        data: A datamodule, the name of one, a YAML file, or rows with ``question`` and ``answer``: a list of dicts, a
            DataFrame or a ``datasets.Dataset``.
        lm: The language model by name or as a config; by default the method's own.
        seed: Seed of the initial prompt and the order of batches. The data has its own.
        folder: The run folder; by default a new one below ``runs``.
        overwrite: Replace the run in the folder.
        callbacks: Further callbacks of the trainer.
        logger: Loggers in place of TensorBoard's; ``False`` for none.
        settings: Settings of the method (``length=8``) or the trainer (``max_steps=130``), and ``budget``, a dict such
            as ``{"tokens": 20_000}``.

    Returns:
        The run. A method without training is tested at once.

    Raises:
        UserError: A setting is wrong, or the training fails; one line says what to do.
    """
    job = _Job.of(method, data, lm, settings)
    place = Path(folder) if folder is not None else Path("runs") / f"{job.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    if (place / names.CONFIG).exists() and not overwrite:
        raise UserError(f"{place} already holds a run; give another folder, load it, or set overwrite=True")
    more = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks or ())
    loggers = [logger] if isinstance(logger, Logger) else [] if isinstance(logger, bool) else list(logger or ())
    given = [*job.words, "--seed_everything", str(seed), "--trainer.default_root_dir", str(place)]
    given += ["--trainer.logger=false"] if logger is False else []
    with job.files(place) as configs, _loaded():
        if not job.trains:
            if overwrite:
                clear(place)
            execute_here(["test", *configs, *given, "--verbose", "false"], callbacks=more)
        else:
            try:
                execute_here(
                    ["fit", *configs, *given, "--overwrite", str(overwrite).lower()], callbacks=more, loggers=loggers
                )
            except SIGTERMException as error:
                if error.code != 128 + signal.SIGINT:
                    raise
                if saved_checkpoint(place) is None:
                    raise KeyboardInterrupt from error
                print(f"stopped; {place} keeps what was learned")
    return PromptRun(place, _which(place))


def _which(folder: Path) -> str:
    """The checkpoint that counts: ``best``, or ``last`` of a run that has no best one."""
    saved = saved_checkpoint(folder)
    return saved.stem if saved else "best"


def load(folder: str | Path) -> PromptRun:
    """Open a run folder that `fit`, `PromptRun.save` or the command line wrote.

    Raises:
        UserError: The folder is no run folder.
    """
    place = Path(folder)
    check_run_folder(place)
    return PromptRun(place, _which(place))


def compare(
    methods: Iterable[Method] | Mapping[str, Method | Mapping[str, Any]],
    data: Data,
    *,
    seeds: int | Sequence[int] = 3,
    lm: str | LMConfig | None = None,
    folder: str | Path | None = None,
    **settings: object,
) -> Comparison:
    """Train and test several methods with several seeds on the same data, and compare them.

    A seed sets the splits of the data, the initial prompt and the order of batches. Finished runs in the folder are
    kept, so the same call continues an interrupted comparison.

    Args:
        methods: Methods as in `fit`; or by name, each a method or a dict with ``method`` and its settings, such as
            ``{"8 vectors": {"method": "soft_prompt", "length": 8}}``.
        data: See `fit`.
        seeds: How many seeds, or the seeds.
        lm: See `fit`.
        folder: Where the runs are stored, as FOLDER/METHOD/seed-K; by default a new one below ``runs``.
        settings: Settings of the trainer for all methods, ``budget``, and settings of every method that has them.

    Raises:
        UserError: A setting is wrong, the folder holds runs with other settings or data, or every run failed. A failed
            run does not stop the others.
    """
    listed = list(methods.items()) if isinstance(methods, Mapping) else [(_name(one), one) for one in methods]
    rows: dict[str, Any] = dict(listed)
    if len({_folder(name) for name in rows}) < len(listed):
        raise UserError("two methods have the same name; give a dict with a name for each")
    jobs: dict[str, _Job] = {}
    known: set[str] = set()
    data = _module(data)
    for name, given in rows.items():
        own = dict(given) if isinstance(given, Mapping) else {"method": given}
        if "method" not in own:
            raise UserError(f"methods: {name!r} has no key 'method'; give a method's name")
        kind = own.pop("method")
        own_names = settings_of(_method(kind)[0])
        shared = {
            key: value for key, value in settings.items() if key in {*own_names, *settings_of(L.Trainer), "budget"}
        }
        known |= shared.keys()
        jobs[name] = _Job.of(kind, data, own.pop("lm", lm), {**shared, **own})
    if not jobs:
        raise UserError("methods must name at least one method")
    if unused := settings.keys() - known:
        raise UserError(f"no method has the setting {min(unused)!r}")
    place = Path(folder) if folder is not None else Path("runs") / f"compare-{datetime.now():%Y%m%d-%H%M%S-%f}"
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    errors: dict[str, str] = {}
    with keep_lms(_lms):
        for name, job in jobs.items():
            config = job.write(place / "settings" / f"{_folder(name)}.yaml", place)
            for seed in chosen:
                where = place / _folder(name) / f"seed-{seed}"
                spec = RunSpec(str(where), (*job.configs, str(config)), job.options, seed, job.trains)
                spec.check_record()
                try:
                    error = attempt(spec) if not spec.done else ""
                except SIGTERMException as stop:
                    if stop.code == 128 + signal.SIGINT:
                        raise KeyboardInterrupt from stop
                    raise
                if error:
                    errors[str(where)] = error
                print(f"{name}, seed {seed}: {error or _summary(Run(where))}")
    if len(errors) == len(jobs) * len(chosen):
        raise UserError(f"every run failed; the first: {next(iter(errors.values()))}")
    return Comparison(place, list(jobs), errors)


@dataclass(frozen=True)
class PromptRun:
    """A run of a method: its prompt, its results, and what can be done with them.

    Args:
        folder: The run folder.
        checkpoint: Which prompt counts: ``best`` on validation, or ``last``.
    """

    folder: Path
    checkpoint: str = "best"

    def test(self) -> pd.DataFrame:
        """Measure the prompt on the test sets; see `metrics`."""
        place = ["--trainer.default_root_dir", str(self.folder), "--verbose", "false"]
        with _loaded():
            execute_here(["test", "-c", str(self.folder / names.CONFIG), *self._trained(), *place])
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
        with _loaded():
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
            with torch.no_grad():
                rows = restored.method.evaluate_batch(examples) if examples else []
        return pd.DataFrame([{"question": row["question"], "answer": row["generated"]} for row in rows])

    @cached_property
    def prompt(self) -> str | Prompt:
        """The prompt: a text, or vectors ``[P, D]``, or keys and values, in float32 on the CPU.

        Raises:
            UserError: The method writes a prompt for each question.
        """
        with _loaded():
            restored, _ = self._restored()
            method = restored.method
            text = method.text if isinstance(method, FixedPrompt) else method.prompt_text()
            if text is None and type(method).prompt_for is not PromptMethod.prompt_for:
                raise UserError(f"{type(method).__name__} writes a prompt for each question; see predictions")
            with torch.no_grad():
                found = method.current_prompt() if text is None else text
        return found.detach().float().cpu() if isinstance(found, torch.Tensor) else found

    @property
    def metrics(self) -> pd.DataFrame:
        """The metrics of `test`: one row per test set."""
        import pandas as pd

        table: dict[str, dict[str, float]] = {}
        for name, value in Run(self.folder).metrics.items():
            split, _, metric = name.rpartition("/")
            if split.startswith("test"):
                table.setdefault(split, {})[metric] = value
        return pd.DataFrame.from_dict(table, orient="index")

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

    def export(self, format: str, out: str | Path | None = None, **options: object) -> Path:
        """Write the prompt for other programs, and check the files by scoring.

        Args:
            format: ``peft``, ``vllm``, ``safetensors``, ``npy`` or ``text``.
            out: The folder to write; by default RUN/export/FORMAT.
            options: Options of ``lightning-prompts export``, such as ``base="models/base"``.

        Returns:
            The folder.

        Raises:
            UserError: The format does not support the prompt, or scores differ.
        """
        if format not in FORMATS:
            raise UserError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
        if unknown := options.keys() - EXPORT_OPTIONS:
            raise UserError(f"unknown option {min(unknown)!r}; {nearest(min(unknown), EXPORT_OPTIONS)}")
        place = Path(out) if out is not None else self.folder / "export" / format
        given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value]
        with _loaded():
            export_command(
                [str(self.folder), "--format", format, "--out", str(place), "--checkpoint", self.checkpoint, *given]
            )
        return place

    def save(self, folder: str | Path) -> PromptRun:
        """Copy the run folder, and return the copy.

        Raises:
            UserError: The folder exists.
        """
        place = Path(folder)
        if place.exists():
            raise UserError(f"{place} exists; give another folder, or remove it")
        shutil.copytree(self.folder, place)
        config = place / names.CONFIG
        text, rows = config.read_text(encoding="utf-8"), str((self.folder / "data").absolute())
        write_atomic(config, text.replace(rows, str((place / "data").absolute())))  # the copy has its own rows
        return PromptRun(place, self.checkpoint)

    def _restored(self) -> tuple[RestoredRun, TextDataModule]:
        """Load the LM as the run had it, and the prompt."""
        restored = open_run(self.folder, self.checkpoint, exact=False)
        device = restored.trainer.strategy.root_device
        restored.restore()
        restored.method.to(device)  # a Trainer moves its method to the CPU in the end
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
        run = Run(self.folder)
        text = f"<p>Prompt: <code>{escape(run.text)}</code></p>" if run.text else ""
        table = self.metrics.to_html(float_format="{:.4f}".format) if run.metrics else "<p>not tested yet</p>"
        return f"<h4>{escape(str(run.class_name))} in {escape(str(self.folder))}</h4>{text}{table}"


@dataclass(frozen=True)
class Comparison:
    """Methods beside each other: mean and standard deviation over seeds.

    Attributes:
        folder: Where the runs are.
        methods: Their names, in the order that was given.
        errors: Errors of failed runs in one line each, by run folder.
    """

    folder: Path
    methods: list[str]
    errors: dict[str, str] = field(default_factory=dict)

    def runs(self, method: str) -> list[PromptRun]:
        """The finished runs of a method, by seed."""
        places = sorted((self.folder / _folder(method)).glob("seed-*"), key=lambda place: int(place.name[5:]))
        return [PromptRun(place) for place in places if (place / names.METRICS).is_file()]

    @property
    def table(self) -> pd.DataFrame:
        """One row per method: mean and standard deviation of each test metric over seeds, tokens and seconds."""
        import pandas as pd

        found = {}
        for name in self.methods:
            runs = [Run(run.folder) for run in self.runs(name)]
            each = pd.DataFrame(
                [
                    {
                        **{
                            key.removeprefix("test/"): value
                            for key, value in run.metrics.items()
                            if key.startswith("test/")
                        },
                        "train_tokens": run.budget.get("tokens", 0.0),
                        "train_seconds": run.budget.get("seconds", 0.0),
                    }
                    for run in runs
                ]
            )
            row: dict[str, Any] = {"seeds": len(runs)}
            for column in each.columns:
                if column != "examples":
                    row[column] = each[column].mean()
                    if not column.startswith("train_"):
                        row[f"{column}_sd"] = each[column].std(ddof=1) if len(runs) > 1 else 0.0
            found[name] = row
        return pd.DataFrame.from_dict(found, orient="index")

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report page of all runs.

        Args:
            out: The page, ``....html``; by default ``report.html`` in the folder.

        Returns:
            The page. The same as Markdown is written beside it.
        """
        from lightning_prompts.report import command

        page = Path(out) if out is not None else self.folder / "report.html"
        command.main([str(self.folder), "--out", str(page)])
        return page

    def _repr_html_(self) -> str:
        """The table as a notebook shows it."""
        failed = "".join(f"<p>failed: {escape(place)}: {escape(error)}</p>" for place, error in self.errors.items())
        return f"{self.table.to_html(float_format='{:.4g}'.format)}{failed}"

    def __repr__(self) -> str:
        """The table as text."""
        return str(self.table.to_string(float_format="{:.4g}".format))


@dataclass(frozen=True)
class _Job:
    """A method on some data, as the command line takes it."""

    name: str
    configs: tuple[str, ...]
    config: dict[str, Any]
    options: dict[str, Any]
    trains: bool

    @classmethod
    def of(cls, method: Method, data: Data, lm: str | LMConfig | None, settings: Mapping[str, Any]) -> _Job:
        """Sort settings by what they belong to, and write objects as plain data.

        Raises:
            UserError: A name is unknown, or an object cannot be written as plain data.
        """
        kind, configs, config = _method(method)
        data_config, data_files = _data(data)
        options: dict[str, Any] = {}
        if lm is not None:
            options |= {"model.lm.name": lm} if isinstance(lm, str) else {"model.lm": asdict(lm)}
        own, trainer = settings_of(kind), settings_of(L.Trainer)
        for name, value in settings.items():
            if name == "budget":
                if not isinstance(value, Mapping):
                    raise UserError(f"budget must be a dict such as {{'tokens': 20_000}}, got {value!r}")
                options |= {f"budget.{key}": number for key, number in value.items()}
            elif name in own and isinstance(value, str) and value.strip() and _is_null(value):
                raise UserError(f"{name}: {value!r} cannot be recorded, as YAML reads it as null; change the text")
            elif name in own:
                options[f"model.{name}"] = _plain(name, value)
            elif name in trainer:
                options[f"trainer.{name}"] = _plain(name, value)
            else:
                raise UserError(f"unknown setting {name!r}; {nearest(name, [*own, *trainer, 'budget'])}")
        trains = not issubclass(kind, FixedPrompt)
        return cls(kind.__name__, (*configs, *data_files), {**config, **data_config}, options, trains)

    @property
    def words(self) -> list[str]:
        """The settings as arguments of the command line."""
        return words(self.options)

    def write(self, path: Path, folder: Path) -> Path:
        """Write the config to a file, and rows in Python below a folder, each table under a name of its own."""
        config = dict(self.config)
        if "data" in config:
            config["data"] = _with_files(config["data"], (folder / "data").absolute())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    @contextmanager
    def files(self, folder: Path) -> Iterator[list[str]]:
        """The configs as arguments of the command line, while the block runs."""
        with tempfile.TemporaryDirectory() as name:
            config = self.write(Path(name) / "settings.yaml", folder)
            yield [word for file in (*self.configs, str(config)) for word in ("-c", file)]


def _name(method: Method) -> str:
    """What to call a method in a table."""
    if isinstance(method, PromptMethod):
        return type(method).__name__
    return Path(method).stem if _is_file(method) else str(method)


def _folder(name: str) -> str:
    """The folder of a method in a comparison."""
    return name.replace("/", "-")


def _is_file(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith((".yaml", ".yml"))


def _method(method: Method) -> tuple[type[PromptMethod], list[str], dict[str, Any]]:
    """The class of a method, the files and the config that name it."""
    if isinstance(method, PromptMethod):
        kind = type(method)
        defaults = settings_of(kind)
        for name in ("optimizer", "scheduler"):
            if name in defaults and getattr(method, name) not in (None, defaults[name].default):
                raise UserError(
                    f"the {name} of a method object cannot be recorded; give it as a setting, such as "
                    f"{name}={{'class_path': 'torch.optim.SGD', 'init_args': {{'lr': 0.1}}}}"
                )
        plain = {name: _plain(name, value) for name, value in method.hparams.items() if name in defaults}
        return kind, [], {"model": {CLASS: _path(kind), SETTINGS: plain}}
    kinds = {kind.__name__: kind for kind in subclasses(PromptMethod)}
    if _is_file(method):
        if not Path(method).is_file():
            raise UserError(f"no such config: {method}")
        name = (method_of(Path(method)) or "").rpartition(".")[2]
        if name not in kinds:
            raise UserError(f"{method} names no method; give it a model with a class_path")
        return kinds[name], [str(method)], {}
    name = METHODS.get(str(method), str(method))
    if name not in kinds:
        raise UserError(f"unknown method {str(method)!r}; {nearest(str(method), [*METHODS, *kinds])}")
    return kinds[name], [], {"model": {CLASS: _path(kinds[name]), SETTINGS: {}}}


def _module(data: Data) -> Data:
    """Data with rows in Python as a datamodule."""
    return data if isinstance(data, str | Path | TextDataModule) else QuestionAnswer.from_rows(data)


def _data(data: Data) -> tuple[dict[str, Any], list[str]]:
    """The config and the files that name the data."""
    if isinstance(data, str | Path):
        if _is_file(data):
            return {}, [str(data)]
        kinds = {kind.__name__: kind for kind in subclasses(TextDataModule)}
        if data not in kinds:
            raise UserError(f"unknown dataset {str(data)!r}; {nearest(str(data), kinds)}")
        return {"data": {CLASS: _path(kinds[str(data)]), SETTINGS: {}}}, []
    return {"data": _data_config(_module(data))}, []


def _data_config(module: TextDataModule) -> dict[str, Any]:
    """A datamodule as plain data, with all its settings, so that none of another config remains.

    Rows in Python stand under their split, for `_with_files`.
    """
    known = settings_of(type(module))
    given = {name: value for name, value in module.settings.items() if name in known}
    if isinstance(module, QuestionAnswer):
        given |= module.tables()
    plain = {name: _members(value) if name == "members" else _plain(name, value) for name, value in given.items()}
    return {CLASS: _path(type(module)), SETTINGS: plain}


def _members(value: Any) -> dict[str, Any]:  # noqa: ANN401 - the datasets of a mixture by name
    return {name: _data_config(one) if isinstance(one, TextDataModule) else one for name, one in value.items()}


def _with_files(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config of data with files in place of rows in Python. The same rows have the same file, and no other rows."""
    settings: dict[str, Any] = {}
    for name, value in config[SETTINGS].items():
        if name == "members":
            settings[name] = {
                key: _with_files(one, folder) if isinstance(one, dict) else one for key, one in value.items()
            }
        elif name in ROWS and isinstance(value, list):
            text = "".join(json.dumps(row, default=str) + "\n" for row in value)
            file = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
            if not file.exists():
                write_atomic(file, text)
            settings[name] = str(file)
        else:
            settings[name] = value
    return {**config, SETTINGS: settings}


def _is_null(text: str) -> bool:
    """Whether the parser takes a text for no text."""
    try:
        return yaml.safe_load(text) is None
    except yaml.YAMLError:
        return False


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(name: str, value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    """A setting as numbers, texts, lists and dicts.

    Raises:
        UserError: It is an object that does not say how it was made.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {_plain(name, key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    plain = as_plain({name: value})
    if name not in plain:
        raise UserError(f"{name}: {value!r} cannot be recorded; give it as {{'class_path': ..., 'init_args': {{...}}}}")
    return plain[name]


def _summary(run: Run) -> str:
    shown = [
        f"{name} {run.metrics[f'test/{name}']:.4f}" for name in ("nll", "exact_match") if f"test/{name}" in run.metrics
    ]
    return ", ".join(shown) or "done"
