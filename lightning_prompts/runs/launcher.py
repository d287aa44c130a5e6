"""Launches runs: one with `launch`, many in this process with `launch_all`.

Runs in one process load each LM once, and their results equal those of separate processes. A run that is already done
is kept, so the same call continues an interrupted study.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_prompts.errors import UserError
from lightning_prompts.files import load_yaml, read_json, write_atomic
from lightning_prompts.runs import names
from lightning_prompts.runs.reader import Run, saved_checkpoint

Execute = Callable[[list[str]], object]


@dataclass(frozen=True)
class RunSpec:
    """What to run, and where.

    Attributes:
        folder: The run folder.
        configs: YAML files; each overrides the ones before.
        settings: Further settings by their dotted names on the command line, which override the configs, as in
            ``{"model": "SoftPromptTuning", "model.length": 4}``.
        seed: The seed of the split, the initial prompt and the order of batches.
        train: Whether to train before the test; methods without training are never trained.
        validate: Whether to measure the tested prompt on the validation set as well, to choose by.
        checkpoint: Which prompt to test: ``best`` on validation, or ``last``.
    """

    folder: str
    configs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    train: bool = True
    validate: bool = False
    checkpoint: str = "best"

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """The spec that `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "configs": tuple(fields["configs"])})

    def to_json(self) -> str:
        """The spec as text."""
        return json.dumps(asdict(self))

    @property
    def words(self) -> list[str]:
        """The configs, settings and seeds as arguments of the command line."""
        given = [word for config in self.configs for word in ("-c", config)]
        return [*given, "--seed_everything", str(self.seed), "--data.seed", str(self.seed), *words(self.settings)]

    @property
    def trains(self) -> bool:
        """Whether the run trains something.

        Raises:
            UserError: Neither the settings nor the configs name a method.
        """
        if not self.train:
            return False
        named = self.settings.get("model.class_path", self.settings.get("model"))
        found = [method_of(Path(config)) for config in self.configs] if named is None else [_class_path(named)]
        name = next((name for name in reversed(found) if name), None)
        if name is None:
            where = self.configs[0] if self.configs else f"the run {self.folder}"
            raise UserError(f"{where} names no method; give it a model with a class_path")
        return _trains(name)

    @property
    def tested(self) -> bool:
        """Whether the metrics of the test are there."""
        return (Path(self.folder) / names.METRICS).is_file()

    @property
    def done(self) -> bool:
        """Whether everything that the run measures is there."""
        return self.tested and (not self.validate or (Path(self.folder) / names.VALIDATION).is_file())

    @property
    def record(self) -> dict[str, Any]:
        """What ``run.json`` holds, to recognise the run; see `same_run`."""
        texts = [hashlib.sha256(Path(config).read_bytes()).hexdigest() for config in self.configs]
        options = words(self.settings)
        return {"configs": texts, "seed": self.seed, "options": options, "checkpoint": self.checkpoint}

    def check_record(self) -> None:
        """Check that the folder holds no other run, which would count as this run or be replaced by it.

        Raises:
            UserError: The run in the folder has other settings or other texts of its configs, or was not launched.
        """
        folder = Path(self.folder)
        found = read_json(folder / names.RECORD)
        if found is None and (self.done or (folder / names.CONFIG).exists()):
            raise UserError(
                f"{self.folder} holds a run that was made by hand, as it has no {names.RECORD}; give another folder, "
                "or move that run away"
            )
        # A launch that failed or was interrupted before the end of its training may be replaced.
        made = self.done or all((folder / name).exists() for name in (names.CONFIG, names.SECONDS))
        if found is not None and not same_run(found, self.record) and made:
            raise UserError(
                f"{self.folder} holds a run that was made with other options or another text of its configs; "
                "give another folder, or remove that one to run it again"
            )


def same_run(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of the same run. The order of its options matters only where they overlap."""
    return _in_any_order(one) == _in_any_order(other)


def _in_any_order(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its options sorted, and the pairs of options that must stay in their order."""
    options = record.get("options")
    if not isinstance(options, list):  # the file is damaged
        return dict(record)
    pairs = itertools.combinations(map(str, options), 2)
    return {**record, "options": sorted(map(str, options)), "pairs": sorted(pair for pair in pairs if _overlap(*pair))}


def _overlap(one: str, other: str) -> bool:
    """Whether an option sets what another one sets, or a part of it.

    >>> _overlap("--model.init=Zeros", "--model.init.init_args.x=1"), _overlap("--model.x=1", "--model.x_y=1")
    (True, False)
    """
    first, second = (f"{short_name(word[2:].partition('=')[0].rstrip('+'))}." for word in (one, other))
    return first.startswith(second) or second.startswith(first) or "config." in (first, second)


def short_name(name: str) -> str:
    """A dotted name without the words that may be left out.

    >>> short_name("model.optimizer.init_args.lr"), short_name("model.class_path")
    ('model.optimizer.lr', 'model')
    """
    return ".".join(part for part in name.split(".") if part not in ("init_args", "class_path"))


def words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of the command line.

    >>> words({"model.length": 4, "model.init": {"class_path": "Zeros"}, "data.chat": True})
    ['--model.length=4', '--model.init={"class_path": "Zeros"}', '--data.chat=true']
    """
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def launch(spec: RunSpec, execute: Execute | None = None) -> Run:
    """Train, if there is something to train, and test. Steps that are done are not repeated.

    Inside of `lightning_prompts.lm.reuse.keep_lms` the LM of an earlier run is used again.

    Args:
        spec: What to run.
        execute: Runs one command of ``lightning-prompts`` from its arguments, and raises errors; by default in this
            process.

    Returns:
        The finished run.

    Raises:
        UserError: The run failed, or its folder holds a run with other settings.
    """
    from lightning_prompts.lm.reuse import keep_lms

    spec.check_record()
    if not spec.done:
        with keep_lms() as kept, kept.one_run():
            _execute(spec, execute or execute_here)
    return Run(Path(spec.folder))


def _execute(spec: RunSpec, execute: Execute) -> None:
    from lightning_prompts.runs.record import clear

    folder = Path(spec.folder)
    place = ["--trainer.default_root_dir", spec.folder]
    given = [*spec.words, *place]
    trains = spec.trains
    trained = (folder / names.SECONDS).is_file() and same_run(read_json(folder / names.RECORD) or {}, spec.record)
    if not trained or (trains and saved_checkpoint(folder) is None):
        if (folder / names.RECORD).exists():
            clear(folder)  # what an earlier launch left; `fit` itself refuses to replace any other run
        write_atomic(folder / names.RECORD, json.dumps(spec.record))
        start = time.monotonic()
        if trains:
            execute(["fit", *given])
        write_atomic(folder / names.SECONDS, json.dumps({"seconds": time.monotonic() - start if trains else 0.0}))
    if trains:
        # The config names the folder that the run was trained in, from which it may have moved.
        given = ["-c", str(folder / names.CONFIG), "--ckpt_path", spec.checkpoint, *place]
    if spec.validate and not (folder / names.VALIDATION).is_file():
        execute(["validate", *given, "--verbose", "false"])
    if not spec.tested:
        execute(["test", *given, "--verbose", "false"])


def execute_here(args: list[str], **more: Any) -> None:
    """Run one command in this process, and leave the process as it was; for the arguments and errors see `execute`."""
    from lightning_prompts.cli.main import execute
    from lightning_prompts.runs.loggers import finished

    with _separate(args), nullcontext() if more.get("more_loggers") else finished():
        execute(args, **more)
    gc.collect()  # trainers and methods refer to each other, and hold memory of the device


@contextmanager
def _separate(args: Sequence[str]) -> Iterator[None]:
    """Reset what a command changes for its whole process, so that the next command does not depend on it."""
    import torch

    environment, argv = dict(os.environ), sys.argv
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    sys.argv = [argv[0], *args]  # Lightning starts further processes of a run with the arguments of this one
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic, warn_only=only_warn)
        torch.backends.cudnn.benchmark = benchmark
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()


def launch_all(
    specs: Iterable[RunSpec],
    begin: Callable[[RunSpec], None] = lambda spec: None,
    end: Callable[[RunSpec, str], None] = lambda spec, error: None,
) -> dict[str, str]:
    """Launch runs one after the other in this process. A failed run does not stop the others.

    Args:
        specs: The runs.
        begin: Called before each run.
        end: Called after each run with its error, which is empty after success.

    Returns:
        The errors in one line each, by run folder.

    Raises:
        KeyboardInterrupt: Ctrl-C outside of training.
        SystemExit: Ctrl-C or SIGTERM during training, with the exit code 130 or 143.
    """
    from lightning_prompts.lm.reuse import keep_lms

    errors = {}
    with keep_lms(), _remembered_interrupts() as interrupts:
        for spec in specs:
            begin(spec)
            if error := attempt(spec):
                errors[spec.folder] = error
            end(spec, error)
            if interrupts:
                raise KeyboardInterrupt
    return errors


@contextmanager
def _remembered_interrupts() -> Iterator[list[int]]:
    """Collect each Ctrl-C, besides raising it: Python drops exceptions that are raised while objects are freed."""
    found: list[int] = []

    def interrupted(number: int, frame: object) -> None:
        found.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield found
        return
    signal.signal(signal.SIGINT, interrupted)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def attempt(spec: RunSpec) -> str:
    """`launch` a run, and write what it prints to ``output.txt`` in its folder.

    Returns:
        The error in one line; empty after success.
    """
    output = Path(spec.folder) / names.OUTPUT
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        opened = output.open("w", encoding="utf-8")
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    # Loggers keep the stream that is there when they are imported; and the clock that measures training starts later.
    from lightning_prompts import cli  # noqa: F401

    with opened as file, redirect_stdout(file), redirect_stderr(file):
        try:
            launch(spec)
        except UserError as error:
            print(f"error: {error}")
            return str(error)
        except SystemExit as error:
            if isinstance(error.code, int) and error.code > 128:  # a signal
                raise
        except Exception as error:  # noqa: BLE001 - a failed run does not stop the others
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            return ""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else f"ended early; see {output}"


def method_of(config: Path) -> str | None:
    """The class of the method that a YAML file names; ``None`` if it names none.

    Raises:
        UserError: The file is not valid YAML.
    """
    content = load_yaml(config)
    return _class_path(content.get("model")) if isinstance(content, dict) else None


def _class_path(model: object) -> str | None:
    name = model.get("class_path") if isinstance(model, Mapping) else model
    return name if isinstance(name, str) else None


def _trains(name: str) -> bool:
    """Whether a class trains something; all do but `FixedPrompt` and its subclasses."""
    from lightning_prompts import methods  # takes seconds

    home, _, short = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(home) if home else methods, short)
    except Exception:  # noqa: BLE001 - of any kind: the run itself reports in one line what is wrong
        return True
    return not (isinstance(found, type) and issubclass(found, methods.FixedPrompt))
