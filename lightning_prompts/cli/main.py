"""LightningCLI with this project's classes, defaults and run folder."""

from __future__ import annotations

import logging
import os
import shlex
import signal
from collections.abc import Callable, Sequence
from datetime import datetime
from inspect import isclass
from pathlib import Path
from pydoc import locate
from typing import Any, Union, get_args

# Checkpoints are data: torch.load never runs code from one, whoever calls it.
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
# Lightning 2.6 calls functions of jsonargparse that its newer versions deprecate.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from lightning_prompts import callbacks, datamodules, methods
from lightning_prompts.accelerators import check_accelerator
from lightning_prompts.checkpoints import AtomicCheckpointIO, check_readable
from lightning_prompts.cli.checks import check
from lightning_prompts.cli.errors import one_line, to_user_error, user_error
from lightning_prompts.cli.terminal import quiet, results_table, use_own_progress_bar
from lightning_prompts.cli.words import keep_texts
from lightning_prompts.errors import DEBUG, UsageError, UserError, check_finite
from lightning_prompts.runs import loggers
from lightning_prompts.runs.names import BEST, CHECKPOINTS, CONFIG, LAST
from lightning_prompts.runs.reader import saved_checkpoint
from lightning_prompts.runs.record import RunFolder, check_writable

log = logging.getLogger(__name__)

TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "max_epochs": 10,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 5,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # RunFolder prints a shorter one
    "use_distributed_sampler": False,  # every process sees the whole batch, and works on its part of it
}

CALLBACK_DEFAULTS: list[dict[str, Any]] = [
    {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "filename": "best",
            "monitor": methods.PromptMethod.monitor.metric,
            "mode": methods.PromptMethod.monitor.mode,
            "save_top_k": 1,
            "enable_version_counter": False,
            "save_on_train_epoch_end": False,
        },
    },
    {"class_path": "lightning_prompts.callbacks.GradientScaling"},
    {"class_path": "lightning_prompts.callbacks.NonFiniteGuard"},
    {"class_path": "lightning_prompts.callbacks.PromptReadout"},
    {"class_path": "lightning_prompts.callbacks.PromptPath"},
    {"class_path": "lightning_prompts.callbacks.PromptTable"},
    {"class_path": "lightning_prompts.callbacks.SampleGenerations"},
    {"class_path": "lightning_prompts.callbacks.Throughput"},
]
ALWAYS = (callbacks.ResultFiles, callbacks.ValidateAtEnd, callbacks.StopOnSignal)  # every run has these


class Parser(LightningArgumentParser):
    """LightningArgumentParser whose errors are one line, with the nearest valid names."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # noqa: ANN401 - it never returns
        """Raise the error in one line."""
        if os.environ.get(DEBUG) and ex is not None:
            raise ex
        raise UsageError(str(user_error(ex) or one_line(message)))

    def add_class_arguments(self, theclass: type, *args: object, **kwargs: object) -> list[str]:
        """Add the settings of a class; a logger's folder is not required, as it is the run folder by default."""
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        if isclass(theclass) and issubclass(theclass, Logger) and "save_dir" in added:
            self.set_defaults({"save_dir": ""})
            next(action for action in self._actions if action.dest == "save_dir").required = False
        if isclass(theclass) and issubclass(theclass, MLFlowLogger) and "experiment_name" in added:
            self.set_defaults({"experiment_name": loggers.PROJECT})
        keep_texts(self)
        return added

    def add_subclass_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Add an option for a class and its settings."""
        super().add_subclass_arguments(*args, **kwargs)
        keep_texts(self)


def _read_integers_first(parser: LightningArgumentParser) -> None:
    """Read ``1`` as one batch and not as ``1.0``, the whole set.

    The parser takes the first type of a union that can read a value. Python caches unions regardless of the order of
    their members. So if another package, such as Ray, has used ``Optional[Union[float, int]]`` before, Lightning's
    annotations ``Optional[Union[int, float]]`` have floats first as well.
    """
    for action in parser._actions:
        kinds = list(get_args(getattr(action, "_typehint", None)))
        if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
            kinds.remove(int)
            kinds.insert(kinds.index(float), int)
            setattr(action, "_typehint", Union[tuple(kinds)])  # noqa: B010, UP007 - not all actions have it; made at run time


class PromptCLI(LightningCLI):
    """LightningCLI with this project's classes, defaults and run folder."""

    def __init__(
        self,
        args: Sequence[str],
        callbacks: Sequence[L.Callback] = (),
        more_loggers: Sequence[Logger] = (),
        make_trainer: Callable[..., L.Trainer] | None = None,
    ) -> None:
        """Parse the arguments, build the classes, and run the subcommand.

        Args:
            args: The words of the command line.
            callbacks: Further callbacks of the trainer.
            more_loggers: Loggers in place of the config's.
            make_trainer: Makes the trainer from the settings of the config; by default `lightning.Trainer`.
        """
        self.words = list(args)
        self.more_callbacks, self.more_loggers = list(callbacks), list(more_loggers)
        self.make_trainer = make_trainer
        self._empty_loggers: Callable[[], None] = lambda: None
        super().__init__(
            methods.PromptMethod,
            datamodules.TextDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={
                "prog": "lightning-prompts",
                "allow_abbrev": False,
                **{name: {"allow_abbrev": False} for name in self.subcommands()},
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=RunFolder,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [always() for always in ALWAYS]},
            load_from_checkpoint_support=False,
            args=self.words,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands, without the option to load checkpoints that run code."""
        return {
            name: {*skip, "weights_only", "return_predictions"} for name, skip in LightningCLI.subcommands().items()
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Collect the settings of the called subcommand only, as each takes a while."""
        called = self.words[0] if self.words else ""
        if called in self.subcommands() and called != subcommand:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the default callbacks, the budget, the last checkpoint and ``--overwrite``."""
        _read_integers_first(parser)
        parser.set_defaults({"trainer.callbacks": CALLBACK_DEFAULTS})
        parser.add_lightning_class_args(callbacks.Budget, "budget")
        parser.add_lightning_class_args(callbacks.LastCheckpoint, "checkpoint")
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Replace the run that the run folder already holds."
        )

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: ``config.yaml`` is the record of the run."""

    def before_instantiate_classes(self) -> None:
        """Check the run folder and the checkpoint before anything is built."""
        config = self.config[self.config.subcommand]
        if config.trainer.default_root_dir is None:
            name = f"{_class_name(config.model)}-{_class_name(config.data)}-{datetime.now():%Y%m%d-%H%M%S}"
            config.trainer.default_root_dir = str(Path("runs") / name)
        self.folder = Path(config.trainer.default_root_dir)
        check_writable(self.folder)
        _check_trainer(config.trainer)
        if isinstance(config.trainer.accelerator, str):
            check_accelerator(config.trainer.accelerator, self.words)
        _monitor(config)
        resumed = self.config.subcommand != "fit" or config.ckpt_path is not None
        self._empty_loggers = loggers.fill(config.trainer.logger, self.folder, resumed)
        self._check_checkpoint(config)
        fresh = self.config.subcommand == "fit" and config.ckpt_path is None
        if fresh and not config.overwrite and (self.folder / CONFIG).exists():
            resume = "resume it with --ckpt_path last, " if (self.folder / CHECKPOINTS / LAST).exists() else ""
            raise UserError(
                f"{self.folder} already holds a run; give another --trainer.default_root_dir, {resume}or replace it "
                "with --overwrite true"
            )

    def _check_checkpoint(self, config: Namespace) -> None:
        """Resolve ``last`` and ``best`` to files of the run folder, and check that the file is complete."""
        saved = self.folder / CHECKPOINTS
        if config.ckpt_path in ("last", "best"):
            path = saved / f"{config.ckpt_path}.ckpt"
            if not path.exists():
                raise UserError(f"checkpoint {path} does not exist: {_instead(path)}")
            config.ckpt_path = str(path)
        if config.ckpt_path is not None:
            check_readable(Path(config.ckpt_path), resume=self.config.subcommand == "fit")
        elif self.config.subcommand != "fit":
            trained = saved_checkpoint(self.folder)
            if trained is not None:
                raise UserError(
                    f"{self.folder} holds a trained prompt: give --ckpt_path {trained}, or another "
                    "--trainer.default_root_dir to measure the untrained one"
                )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build a trainer that writes all its files into the run folder."""
        config = self.config[self.config.subcommand].trainer
        self._empty_loggers()
        given = self._get(self.config_init, "trainer").logger
        if self.config.subcommand == "fit" or config.logger in (None, True):
            kwargs["logger"] = False  # see RunFolder
        if config.enable_checkpointing is False:
            kwargs["enable_checkpointing"] = None  # Lightning refuses false beside checkpoint callbacks
        self.trainer_class = self.make_trainer or self.trainer_class
        trainer = super().instantiate_trainer(**kwargs)
        installed: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.config.subcommand != "fit" and self.more_loggers:
            trainer.loggers = self.more_loggers
        # Lightning has put checkpoints behind all other callbacks.
        first = sum(not isinstance(callback, Checkpoint) for callback in installed)
        for callback in self.more_callbacks:
            installed.insert(len(installed) if isinstance(callback, Checkpoint) else first, callback)
        if config.enable_checkpointing is False:
            installed[:] = [callback for callback in installed if not isinstance(callback, Checkpoint)]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        installed.sort(key=lambda callback: not isinstance(callback, RunFolder))  # loggers start before clocks do
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.folder / CHECKPOINTS).absolute())
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunFolder):
                callback.given_loggers = self.more_loggers or given
            if isinstance(callback, EarlyStopping) and self.config.subcommand == "fit":
                _check_stopping(trainer, callback)
        if config.enable_progress_bar is not False:
            use_own_progress_bar(trainer)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        if subcommand == "test":
            kwargs["verbose"] = False  # see after_test
        untrained = kwargs.get("ckpt_path") is None and not isinstance(self.model, methods.FixedPrompt)
        if subcommand != "fit" and untrained and self.trainer.is_global_zero:
            log.warning("no --ckpt_path is given, so %s uses the prompt as it is before training", subcommand)
        return kwargs

    def after_fit(self) -> None:
        """Exit with a signal's code even if the signal came too late to stop training."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, callbacks.StopOnSignal) and callback.exit_code:
                raise SIGTERMException(callback.exit_code)

    def print_next_command(self) -> None:
        """Print how to test what ``fit`` has trained."""
        best = str((self.folder / CHECKPOINTS / BEST).absolute())
        saved = [getattr(callback, "best_model_path", None) for callback in self.trainer.checkpoint_callbacks]
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self.trainer.checkpoint_callbacks:
            print("nothing is saved, as trainer.enable_checkpointing is false")
            return
        test = f"test it: lightning-prompts test -c {shlex.quote(str(self.folder / 'config.yaml'))} --ckpt_path"
        if best in saved:  # of this run, not of an earlier one
            print(f"{test} best")
        elif self.trainer.global_step:
            validated = any(name.startswith("val/") for name in self.trainer.callback_metrics)
            why = "trainer.callbacks has none that keeps it" if validated else "training ended without a validation"
            print(f"no best.ckpt: {why}; the last state is kept, {test} last")

    def after_test(self) -> None:
        """Print one row for each test set; Lightning would print one column for each."""
        if self.config.test.verbose and self.trainer.is_global_zero:
            Console().print(results_table(self.trainer.callback_metrics))


class PlannedRun(PromptCLI):
    """What ``fit`` would run, built without weights, devices or a run folder."""

    def __init__(self, args: Sequence[str]) -> None:
        """Parse the arguments of ``fit`` and build the classes."""
        quiet(inspected=True)
        super().__init__(["fit", *args])

    def before_instantiate_classes(self) -> None:
        """Check nothing, as nothing is written."""
        self.trainer_config = self.config.fit.trainer.clone()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build a trainer that does nothing, as the config may be for another machine."""
        del kwargs
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)

    def after_instantiate_classes(self) -> None:
        """Read the data."""
        self.datamodule.setup("fit")

    def _run_subcommand(self, subcommand: str) -> None:
        """Do not run it."""


def execute(args: Sequence[str], **more: Any) -> PromptCLI:
    """Run one of Lightning's subcommands in this process.

    Args:
        args: The words of the command line.
        more: See `PromptCLI`.

    Returns:
        The command line, with its method, datamodule and trainer.

    Raises:
        UserError: A known error, in one line.
        KeyboardInterrupt: Ctrl-C outside of training.
        SIGTERMException: A signal stopped the training; its code is the exit code.
        SystemExit: The parser has printed its help.
    """
    args = check(args)
    quiet()
    try:
        return PromptCLI(args, **more)
    except SIGTERMException:
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            raise KeyboardInterrupt from error
        raise
    except Exception as error:
        known = to_user_error(error)
        if known is None or known is error:
            raise
        raise known from error


def main(args: Sequence[str]) -> int:
    """Run one of Lightning's subcommands as a program.

    Args:
        args: The words of the command line.

    Returns:
        The exit code: 0, or that of a signal which stopped the training. Other errors are raised; see `execute`.
    """
    try:
        done = execute(args)
    except SIGTERMException as error:
        return int(error.code or 128 + signal.SIGTERM)
    if done.config.subcommand == "fit":
        done.print_next_command()
    return 0


def _instead(path: Path) -> str:
    """What to do if the run folder does not hold a checkpoint."""
    folder, last = path.parent.parent, path.with_name(LAST)
    if path != last and last.exists():
        return "the run has kept no best one, as after training without a validation; take last instead"
    if (folder / CONFIG).exists():
        return "nothing was saved yet; leave out --ckpt_path, and train anew with fit --overwrite true"
    return f"{folder} holds no run; give its --trainer.default_root_dir"


def _class_name(node: Namespace) -> str:
    return str(node.class_path).rpartition(".")[2]


def _monitor(config: Namespace) -> None:
    """Choose the best checkpoint by the method's own metric, unless the config names another one."""
    method, given = locate(config.model.class_path), config.trainer.callbacks or []
    for node in given if isinstance(given, list) else [given]:
        callback = locate(node.class_path)
        if not (isclass(callback) and issubclass(callback, ModelCheckpoint) and isclass(method)):
            continue  # a function can also build a callback or a method
        settings = node.get("init_args", {})
        if settings.get("monitor") == methods.PromptMethod.monitor.metric and "mode" in settings:
            settings.monitor, settings.mode = getattr(method, "monitor", methods.PromptMethod.monitor)


def _check_stopping(trainer: L.Trainer, callback: EarlyStopping) -> None:
    """Raise a `UserError` if early stopping would never read its metric, or would read it before it exists."""
    every_epoch = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    given = callback._check_on_train_epoch_end
    validated, at_epoch_end = callback.monitor.startswith("val/"), every_epoch if given is None else given
    if trainer.limit_val_batches == 0 and (validated or not at_epoch_end):
        raise UserError("EarlyStopping waits for validations; set trainer.limit_val_batches above 0")
    if validated and at_epoch_end and not every_epoch:
        raise UserError(
            f"EarlyStopping looks for {callback.monitor} after each epoch, and not each has a validation; "
            "leave out its check_on_train_epoch_end"
        )


def _check_trainer(config: Namespace) -> None:
    """Raise a `UserError` for settings that Lightning reports late or unclearly."""
    if config.barebones:
        raise UserError("trainer.barebones turns off logging and checkpoints, which a run needs; leave it out")
    if config.accumulate_grad_batches < 1:
        raise UserError(f"trainer.accumulate_grad_batches must be at least 1, got {config.accumulate_grad_batches}")
    for name, above in (("gradient_clip_val", False), ("val_check_interval", True)):
        value = config[name]
        if isinstance(value, int | float):
            check_finite(f"trainer.{name}", value, above=above)
