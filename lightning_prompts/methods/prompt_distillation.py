"""Prompt distillation: a long context becomes a short prompt (Snell et al. 2022; Mu et al. 2023; Eyuboglu et al. 2025).

Prompt: soft embeddings ``[P, D]``, or keys and values of each layer. Estimator: backpropagation. Objective: divergence
from the same LM with the context.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prompts.errors import UserError, check_at_least
from lightning_prompts.files import read_text
from lightning_prompts.lm import KeyValues, LMConfig, LMShape, MemoryEstimate, Prompt, Sampling
from lightning_prompts.lm.distribution_store import DistributionStore
from lightning_prompts.lm.distributions import Distributions
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.transfer import to_device
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.methods.few_shot import draw_shots, few_shot_prompt
from lightning_prompts.methods.self_study import SelfStudy, Written
from lightning_prompts.objectives.divergence import Divergence
from lightning_prompts.prompts.initializers import Initializer, RandomTokens
from lightning_prompts.prompts.prefix import Prefix
from lightning_prompts.prompts.soft import SoftPrompt
from lightning_prompts.types import Batch, Example

log = logging.getLogger(__name__)

CONTEXT, WRITTEN, SHOTS, FIXED = "context", "written", "shots", "fixed_context"  # in checkpoints


class PromptDistillation(PromptMethod):
    """Trains ``P`` vectors, or a prefix of ``P`` keys and values, to do what a long context does.

    The teacher is the frozen LM with the context in front of the question; the student is the same LM with the prompt.
    The context is a text, solved examples of the training split, or a text with solved examples after it. The run's
    seed decides which examples are drawn, as in `FewShot`. Checkpoints contain the context.

    Validation and test compare the student with the teacher and with the question alone. Of the teacher's gain over
    the question alone, ``nll_gain_kept`` and ``exact_match_gain_kept`` are the share that the student keeps; they are
    left out, with a warning, where the teacher gains nothing. ``tokens_saved`` is the mean number of tokens by which
    the student's text is shorter.

    Args:
        length: ``P``, number of vectors, or of positions of the prefix.
        student: ``vectors`` in the template's prompt slot, or a ``prefix``.
        shots: Number of solved examples in the context; ``None`` for 16, or for none with another context.
        context: Text of the context.
        context_file: Text file with the context, in place of ``context``.
        text: The teacher's text in the prompt slot of the question and of the examples; ``None`` for the task's own
            instruction.
        separator: Text at the end of the context and of each example, unless they end with it.
        init: Initial prompt; ``None`` for the first ``P`` tokens of the context: their embeddings, or their keys and
            values. A prefix of the whole context does exactly what the context does in templates that start with the
            prompt slot, unless the tokenizer adds a token to the start of each text, which the question then keeps.
        freeze_first: Whether the first position stays as it is. Many tokens attend to the first position of a text
            (an attention sink), which makes training unstable in some models (Eyuboglu et al. 2025).
        objective: Training objective.
        self_study: Train on answers that the teacher samples, to its own or the data's questions; ``None`` for the
            questions and answers of the data.
        cache: Whether to keep the teacher's log-probabilities on disk: ``4 V`` bytes for each answer token, or
            ``12 top_k`` with ``objective.top_k``. An LM that is split over devices uses no files.
        lm: The frozen language model.
        optimizer: Optimiser of the prompt's parameters. Those of a prefix are in units of the LM's keys and values.
        scheduler: Learning-rate scheduler, stepped every training step; ``None`` for a linear decay to zero over the
            whole run.
        max_new_tokens: Maximum length of a generated answer, in tokens.
    """

    estimator_name = "backpropagation"

    def __init__(
        self,
        length: int = 16,
        student: Literal["vectors", "prefix"] = "vectors",
        shots: int | None = None,
        context: str | None = None,
        context_file: str | None = None,
        text: str | None = "",
        separator: str = "\n",
        init: Initializer | None = None,
        freeze_first: bool = False,
        objective: Divergence = Divergence(),  # noqa: B008
        self_study: SelfStudy | None = None,
        cache: bool = False,
        lm: LMConfig = LMConfig(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; `build_prompt` makes the context and the prompt."""
        super().__init__(lm, max_new_tokens, optimizer, scheduler)
        check_at_least("length", length, 1 + freeze_first)
        if student not in ("vectors", "prefix"):
            raise UserError(f"student must be vectors or prefix, got {student!r}")
        if context is not None and context_file is not None:
            raise UserError("give either context or context_file, not both")
        written = context is not None or context_file is not None
        self.shots = (0 if written else 16) if shots is None else shots
        if self.shots < (not written):
            raise UserError(f"shots must be at least {int(not written)}, got {self.shots}; or give a context")
        self.length = length
        self.student = student
        self.written_context, self.context_file = context, context_file
        self.given_text = text
        self.separator = separator
        self.init = init
        self.frozen = int(freeze_first)
        self.divergence = objective
        self.self_study = self_study
        self.cache = cache
        self.context_text: str | None = None
        self.unknown_context = "give a datamodule: the context is examples of its training split"
        self.fixed_text = ""  # what of the context does not depend on the seed
        self.written: list[Written] = []
        self._examples: list[Example] = []  # of self-study
        self._references: dict[Hashable, dict[str, float]] = {}
        self._sums: dict[str, dict[str, float]] = {}

    @property
    def prompt_kind(self) -> str:  # type: ignore[override]
        """Kind of the student's prompt."""
        return "soft embeddings [P, D]" if self.student == "vectors" else "keys and values of each layer"

    @property
    def objective_name(self) -> str:
        """Name of the objective."""
        return self.divergence.name

    def describe(self) -> str:
        """See `PromptMethod`; also the length of the context."""
        known = "" if self.context_text is None else f"\ncontext: {self.lm.count(self.context_text):,} tokens"
        return f"{super().describe()}{known}"

    # --- the context and the prompt ---------------------------------------------------------------------------------

    def build_prompt(self) -> None:
        """Make the context, and the prompt from its first tokens.

        Raises:
            UserError: The context is empty, shorter than the prompt, or its file or examples are missing.
        """
        self.divergence.check(self.lm)
        if self.length >= self.lm.context:
            raise UserError(
                f"length ({self.length}) leaves no room in the context window of {self.lm.name} ({self.lm.context})"
            )
        self.text = self.task_instruction() if self.given_text is None else self.given_text
        self.context_text = self._make_context()
        self.teacher = DistributionStore(self.lm, self.divergence.top_k, self.cache)
        if self.student == "prefix":
            like = self.lm.key_values(RandomTokens()(self.lm, min(64, self.lm.context)))  # for the scale
            self.prompt: Prefix | SoftPrompt = Prefix(self._initial_key_values(), like, None, self.frozen)
        else:
            self.prompt = SoftPrompt(self._initial_vectors(), frozen=self.frozen)

    def _make_context(self) -> str | None:
        """Return the context; ``None`` if it has to come from a checkpoint.

        That is the case without a datamodule to draw its examples from, and outside of training if its file or its
        examples are missing.
        """
        try:
            return self._read_context()
        except UserError as error:
            if self._trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING):
                raise
            self.unknown_context = str(error)
            return None

    def _read_context(self) -> str | None:
        data = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        text = self.written_context or ""
        if self.context_file is not None:
            found = read_text(Path(self.context_file))
            if found is None:
                raise UserError(f"context_file {self.context_file} does not exist")
            text = found
        if not text.strip() and (self.written_context is not None or self.context_file is not None):
            raise UserError(f"{'context' if self.context_file is None else self.context_file} is empty")
        if text and not text.endswith(self.separator):
            text += self.separator
        self.fixed_text = text
        if self.shots and data is None:
            return None
        drawn = draw_shots(data.examples("train"), self.shots) if data is not None and self.shots else []
        return text + few_shot_prompt(self.text, drawn).solved(self.separator)

    def _first_tokens(self, bos: Sequence[int] = ()) -> Tensor:
        """Return the first tokens of the context, ``[P]``."""
        if self.context_text is None:  # a checkpoint replaces the prompt
            return torch.zeros(self.length, dtype=torch.long, device=self.lm.device)
        ids = [*bos, *self.lm.encoder.tokens(self.context_text, start=True)]
        if len(ids) < self.length:
            raise UserError(
                f"length ({self.length}) is more than the {len(ids)} tokens of the context; lower length, or give init"
            )
        return to_device(ids[: self.length], self.lm.device)

    def _initial_vectors(self) -> Tensor:
        if self.init is not None:
            return self.init(self.lm, self.length)
        return self.lm.embed(self._first_tokens()).detach().float()

    def _initial_key_values(self) -> KeyValues:
        if self.init is not None:
            return self.init.key_values(self.lm, self.length)
        return self.lm.key_values(self.lm.embed(self._first_tokens(self.lm.encoder.bos_ids)))

    def current_prompt(self) -> Prompt:
        """Return the prompt: ``[P, D]``, or keys and values."""
        return self.prompt()  # type: ignore[no-any-return]

    def initial_prompt(self) -> Prompt:
        """Return the prompt before training."""
        return self.prompt.start() if isinstance(self.prompt, Prefix) else self.prompt.initial

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`; the teacher's answers are estimated as ``max_new_tokens`` long."""
        bins = shape.vocabulary if self.divergence.top_k is None else 3 * self.divergence.top_k
        teacher = batch_size * self.max_new_tokens * bins
        if self.student == "prefix":
            own = self.length * shape.key_value_width
            return MemoryEstimate(own, kept=own, saved=2 * own + teacher, ahead=self.length, backward=True)
        own = self.length * shape.width
        return MemoryEstimate(own, kept=own, saved=teacher, length=self.length, backward=True)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`."""
        return {**super().checkpoint_meta(), "student": self.student}

    @property
    def shot_settings(self) -> list[object]:
        """What the examples in the context depend on beside the data and the seed."""
        return [self.shots, self.text, self.separator]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the context, and the questions and answers of self-study."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[CONTEXT], checkpoint[WRITTEN] = self.context_text, self.written
        checkpoint[SHOTS], checkpoint[FIXED] = self.shot_settings, self.fixed_text

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the context, and the questions and answers of self-study.

        Raises:
            UserError: Training would resume with another context.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint[CONTEXT] or ""
        if self.given_text is None and SHOTS in checkpoint and getattr(self._trainer, "datamodule", None) is None:
            self.text = checkpoint[SHOTS][1]
        unread = not self.fixed_text and (self.written_context or self.context_file) is not None
        same = saved.startswith(self.fixed_text) if FIXED not in checkpoint else checkpoint[FIXED] == self.fixed_text
        if not (same or unread) or checkpoint.get(SHOTS, self.shot_settings) != self.shot_settings:
            if self._trainer is not None and self.trainer.training:
                raise UserError("the context has changed since the checkpoint was written; set it back to continue")
            log.warning("the context has changed since the prompt was trained; the teacher reads the former one")
        self.context_text, self.written = saved, checkpoint[WRITTEN]
        self._references.clear()

    # --- the teacher ------------------------------------------------------------------------------------------------

    def with_context(self, examples: Sequence[Example]) -> list[Example]:
        """Put the context in front of each example.

        Raises:
            UserError: The context is unknown; see `_make_context`.
        """
        if self.context_text is None:
            raise UserError(f"PromptDistillation: {self.unknown_context}")
        return [replace(example, before=self.context_text + example.before) for example in examples]

    def teacher_rows(self, examples: Sequence[Example]) -> list[Row]:
        """Encode examples with the context in front and the text in the prompt slot.

        Raises:
            UserError: An answer has other tokens than without the context; or see `FrozenLM.encode`.
        """
        ids = self.lm.encoder.tokens(self.text)
        rows = self.lm.encode(self.with_context(examples), len(ids), self.divergence.with_end)
        own = self.lm.encode_answers(examples, self.current_prompt(), self.divergence.with_end)
        for example, row, mine in zip(examples, rows, own, strict=True):
            if row.answer + row.end != mine.answer + mine.end:
                raise UserError(
                    f"{example.source or 'example'}: the answer has other tokens after the context; let the template "
                    "have some text between {prompt} and {answer}"
                )
        filled = [[ids[-1 - token] if token < 0 else token for token in row.context] for row in rows] if ids else None
        return (
            rows if filled is None else [Row(one, row.answer, row.end) for one, row in zip(filled, rows, strict=True)]
        )

    def teach(self, examples: Sequence[Example]) -> Distributions:
        """Return the teacher's distributions at the answer and end tokens of examples, in order."""
        return self.teacher(self.teacher_rows(examples))

    def _check_lengths(self) -> None:
        super()._check_lengths()
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.trainer.state.fn is None or self.trainer.state.fn.value == "predict":
            return
        if self.context_text is None and self.trainer.state.fn != TrainerFn.FITTING:
            return  # a checkpoint will bring it
        ahead = self.lm.count(self.text)
        for split in self.splits_ahead():
            if split == "predict":  # without the teacher
                continue
            try:
                self.lm.check_examples(self.with_context(data.examples(split)), 0, ahead)
            except UserError as error:
                raise UserError(f"with the context in front: {error}; or shorten the context") from error

    def on_predict_start(self) -> None:
        """Check that a prompt without training has the first tokens of the context."""
        if self.context_text is None and self.init is None:
            self.with_context([])

    # --- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Let the LM write questions and answers, unless a checkpoint has them."""
        super().on_train_start()
        if self.self_study is None:
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self.written:
            self.written = self.self_study.study(data, self.text, self.max_new_tokens, self._write)
            log.info("self-study: %d questions with answers of the teacher", len(self.written))
        self._examples = [self.self_study.example(data, question, answer) for question, answer in self.written]

    def _write(self, examples: Sequence[Example], text: str, max_tokens: int, seeds: Sequence[int]) -> list[str]:
        """Sample a text after each example, with the context in front and ``text`` in the slot."""
        assert self.self_study is not None
        temperature, size = self.self_study.temperature, self.lm.texts_at_once

        def work(part: Sequence[tuple[Example, int]]) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(part), size):
                shown, own = zip(*part[start : start + size], strict=True)
                texts += self.lm.generate(self.with_context(shown), text, max_tokens, Sampling(temperature, own))
            return texts

        return self.map_across_ranks(list(zip(examples, seeds, strict=True)), work)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, or of as many examples of self-study."""
        del batch_idx
        if self._examples:
            order = torch.randperm(len(self._examples), generator=self.step_generator(), device="cpu").tolist()
            batch = Batch([self._examples[index] for index in order[: len(batch)]], batch.split)
        batch = self.own_part(batch)
        return self.answer_step(batch, self.current_prompt(), self.divergence.against(self.teach(batch.examples)))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _log_rows(self, split: str, batch: Batch, rows: list[dict[str, Any]]) -> None:
        """Log the teacher and the question alone beside the student, and remember the sums over the split."""
        super()._log_rows(split, batch, rows)
        known = [example.identity for example in batch.examples]
        new = [example for example, key in zip(batch.examples, known, strict=True) if key not in self._references]
        for example, reference in zip(new, self.map_across_ranks(new, self._compare), strict=True):
            self._references[example.identity] = reference
        references = [self._references[key] for key in known]
        names = ("teacher_nll", "teacher_exact_match", "no_context_nll", "no_context_exact_match", "tokens_saved")
        sums = self._sums.setdefault(split, defaultdict(float))
        for name in names:
            total = sum(reference[name] for reference in references)
            self.log_mean(f"{split}/{name}", total / len(rows), len(rows))
            sums[name] += total
        sums["nll"] += sum(row["nll"] for row in rows)
        sums["exact_match"] += sum(float(row["correct"]) for row in rows)

    def _compare(self, examples: Sequence[Example]) -> list[dict[str, float]]:
        """Evaluate the teacher and the question alone."""
        shown = self.with_context(examples)
        teacher, nothing = self.evaluate(shown, self.text), self.evaluate(examples, self.lm.no_prompt())
        text = self.lm.count(self.text)
        return [
            {
                "teacher_nll": one["nll"],
                "teacher_exact_match": float(one["correct"]),
                "no_context_nll": other["nll"],
                "no_context_exact_match": float(other["correct"]),
                "tokens_saved": float(self.lm.length(long) + text - self.lm.length(short) - self.length),
            }
            for one, other, long, short in zip(teacher, nothing, shown, examples, strict=True)
        ]

    def _log_kept(self) -> None:
        """Log the shares of the teacher's gains that the student keeps, over each split."""
        for split, sums in self._sums.items():
            for name in ("nll", "exact_match"):
                gain = sums[f"no_context_{name}"] - sums[f"teacher_{name}"]
                kept = sums[f"no_context_{name}"] - sums[name]
                if gain * (1 if name == "nll" else -1) > 0:
                    self.log(f"{split}/{name}_gain_kept", kept / gain)
                elif not self.trainer.sanity_checking:
                    log.warning("%s: the context does not improve %s, so there is no gain to keep", split, name)

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums.clear()

    def on_validation_epoch_end(self) -> None:
        """Log the shares that are kept."""
        self._log_kept()
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Reset the sums."""
        self._sums.clear()

    def on_test_epoch_end(self) -> None:
        """Log the shares that are kept."""
        self._log_kept()
