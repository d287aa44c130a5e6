"""Train a prompt."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from datetime import datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_prompts.api.data import Data
from lightning_prompts.api.given_trainer import complete, folder_of, loggers_of
from lightning_prompts.api.job import Job, Method
from lightning_prompts.api.loaded_lms import loaded
from lightning_prompts.api.prompt_run import PromptRun, best_or_last
from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.runs import names
from lightning_prompts.runs.launcher import execute_here
from lightning_prompts.runs.reader import saved_checkpoint
from lightning_prompts.runs.record import check_writable, clear


def fit(
    method: Method,
    data: Data,
    *,
    lm: str | LMConfig | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
    trainer: L.Trainer | Mapping[str, Any] | None = None,
    callbacks: L.Callback | Sequence[L.Callback] | None = None,
    logger: Logger | Sequence[Logger] | bool | None = None,
    verbose: bool = True,
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
        trainer: Settings of the trainer as a dict, or a ``lightning.Trainer``. A Trainer keeps its settings, callbacks
            and loggers, and Lightning's defaults hold in place of this project's: set ``max_steps`` or ``max_epochs``,
            and ``gradient_clip_val=1.0`` if you want it. Added are the run folder, ``metrics.csv``, and the callbacks
            of every run that it does not have. It trains once; `PromptRun.test` builds another from the record.
        callbacks: Further callbacks of the trainer.
        logger: Loggers in place of TensorBoard's; ``False`` for none.
        verbose: Show what is trained, and a progress bar, also in later tests of the run.
        settings: Settings of the method (``length=8``) or the trainer (``max_steps=130``), and ``budget``, a dict such
            as ``{"tokens": 20_000}``.

    Returns:
        The run. A method without training is tested at once.

    Raises:
        UserError: A setting is wrong, or the training fails; one line says what to do.
    """
    job = Job.of(method, data, lm, settings, trainer)
    own = trainer if isinstance(trainer, L.Trainer) else None
    if own is not None:
        folder = folder_of(own, folder)
        found = loggers_of(own)
        if logger is not None and found is not None:
            raise UserError("the Trainer has its own logger setting; leave out logger")
        logger = found if logger is None else logger
    place = Path(folder) if folder is not None else Path("runs") / f"{job.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    if (place / names.CONFIG).exists() and not overwrite:
        raise UserError(f"{place} already holds a run; give another folder, load it, or set overwrite=True")
    check_writable(place)
    make = None if own is None else partial(complete, own)
    more = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks or ())
    loggers = [logger] if isinstance(logger, Logger) else [] if isinstance(logger, bool) else list(logger or ())
    given = [*job.words, "--seed_everything", str(seed), "--trainer.default_root_dir", str(place)]
    given += ["--trainer.logger=false"] if logger is False else []
    given += [] if verbose else ["--trainer.enable_progress_bar=false"]
    with nullcontext() if verbose else redirect_stdout(StringIO()), job.files(place) as configs, loaded():
        if not job.trains:
            if overwrite:
                clear(place)
            untrained = ["test", *configs, *given, "--verbose", "false"]
            execute_here(untrained, callbacks=more, more_loggers=loggers, make_trainer=make)
        else:
            try:
                fresh = ["fit", *configs, *given, "--overwrite", str(overwrite).lower()]
                execute_here(fresh, callbacks=more, more_loggers=loggers, make_trainer=make)
            except SIGTERMException as error:
                if error.code != 128 + signal.SIGINT:
                    raise
                if saved_checkpoint(place) is None:
                    raise KeyboardInterrupt from error
                print(f"stopped; {place} keeps what was learned")
    return PromptRun(place, best_or_last(place))
