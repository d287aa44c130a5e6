"""Validation, test and prediction of all methods: answers, scores and metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_prompts.answers import is_correct
from lightning_prompts.lm import LabelScores, Prompt, label_scores, prompt_length, slot_length
from lightning_prompts.lm.labels import HIDDEN, split_by_labels
from lightning_prompts.methods.distributed import Distributed
from lightning_prompts.types import Batch, Example

# A metric's name contains the name of the test set, so Lightning need not number the dataloaders.
PLACES: dict[str, Any] = {"on_epoch": True, "on_step": False, "add_dataloader_idx": False}


class Monitor(NamedTuple):
    """The validation metric that selects the best prompt for ``best.ckpt``, `KeepsBest` and the callbacks.

    Attributes:
        metric: Name of the metric.
        mode: ``min`` if smaller values are better, ``max`` if larger ones are.
    """

    metric: str
    mode: Literal["min", "max"]

    def better(self, value: float, best: float) -> bool:
        """Return whether a value is strictly better than the best so far."""
        return value < best if self.mode == "min" else value > best


class Evaluation(Distributed):
    """Validation, test and prediction. A subclass implements `prompt_for` and may override `prepare`."""

    max_new_tokens: int

    @abstractmethod
    def current_prompt(self) -> Prompt:
        """Return the prompt for the LM; see `PromptMethod`."""

    @abstractmethod
    def prompt_for(self, examples: Sequence[Example]) -> Prompt:
        """Return the prompt for some examples: one for all, or one for each, ``[B, P, D]``."""

    def relaxed_prompt_for(self, examples: Sequence[Example]) -> Tensor | None:
        """Return the relaxed prompt that is trained in place of tokens, for ``relaxed_nll``, or ``None``."""
        del examples
        return None

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """Prepare examples for evaluation; methods that add text override it."""
        return list(examples)

    def added_tokens(self) -> int:
        """Return the maximum number of tokens that `prepare` adds to an example."""
        return 0

    def _check_lengths(self) -> None:
        """Raise an error before the run starts if an example does not fit the context window."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.trainer.state.fn is None:
            return
        with torch.no_grad():
            prompt = self.current_prompt()
        slot = slot_length(prompt)
        ahead = prompt_length(prompt) - slot + self.added_tokens()
        for split in self.splits_ahead():
            self.language_model.check_examples(data.examples(split), slot, ahead)

    def splits_ahead(self) -> list[str]:
        """Return the splits that the run reads, and for a fit those that its test or prediction will read."""
        assert self.trainer.state.fn is not None
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        stage = self.trainer.state.fn.value
        return list(dict.fromkeys([*data.splits(stage), *(data.held_out() if stage == "fit" else [])]))

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        """Score and generate answers, or choose a class for examples with classes.

        Args:
            examples: ``B`` examples, with or without reference answers.
            prompt: ``[P, D]`` or ``[B, P, D]``, keys and values, or a text.

        Returns:
            One row per example: question, answer, generated, nll (nats per answer token), correct. The last two are
            ``None`` without a reference, and nll is ``None`` if a server returns none. Rows with classes also have
            label, the likeliest class, which is also generated. Rows of methods that reason about the question also
            have hidden, the reasoning. With a prompt for each example, rows also have prompt, the text of the tokens
            nearest to it.
        """
        prepared = self.prepare(examples)
        rows: list[dict[str, Any]] = [{} for _ in examples]
        for mine, judge in zip(split_by_labels(examples), (self._classify, self._generate), strict=True):
            if mine:
                own = prompt[mine] if isinstance(prompt, Tensor) and prompt.dim() == 3 else prompt
                for index, row in zip(mine, judge([prepared[index] for index in mine], own), strict=True):
                    rows[index] = row
        for row, example, shown in zip(rows, examples, prepared, strict=True):
            if HIDDEN in shown.fields and HIDDEN not in example.fields:
                row[HIDDEN] = shown.fields[HIDDEN]
        if isinstance(prompt, Tensor) and prompt.dim() == 3:
            ids = self.lm.nearest_tokens(prompt.flatten(0, 1))[0].view(prompt.shape[:2])
            for row, own in zip(rows, ids.tolist(), strict=True):
                row["prompt"] = self.lm.text(own)
        return rows

    def _generate(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        """Return the rows of examples with free-text answers."""
        generated = self.write_answers(examples, prompt)
        answered = [index for index, example in enumerate(examples) if example.answer is not None]
        nll: dict[int, float | None] = {}
        if answered:
            own = prompt[answered] if isinstance(prompt, Tensor) and prompt.dim() == 3 else prompt
            nll = dict(zip(answered, self.answer_nll([examples[index] for index in answered], own), strict=True))
        return [
            {
                "question": example.question,
                "answer": example.reference,
                "generated": text,
                "nll": nll.get(index),
                "correct": is_correct(example, text),
            }
            for index, (example, text) in enumerate(zip(examples, generated, strict=True))
        ]

    def write_answers(self, examples: Sequence[Example], prompt: Prompt | str) -> list[str]:
        """Generate the LM's greedy answers to prepared examples."""
        return self.language_model.generate(examples, prompt, self.max_new_tokens)

    def answer_nll(self, examples: Sequence[Example], prompt: Prompt | str) -> Sequence[float | None]:
        """Compute the NLL of the answers of prepared examples, in nats per token; ``None`` if a server returns none."""
        return self.language_model.answer_nll(examples, prompt)

    def _classify(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        """Return the rows of examples with classes: the answer is the likeliest class, and nothing is generated."""
        scores = self.label_scores(examples, prompt)
        chosen = scores.log_probs.argmax(-1).tolist()
        return [
            {
                "question": example.question,
                "answer": example.reference,
                "generated": example.labels[label][0],
                "nll": nll,
                "correct": None if example.reference is None else label == example.label,
                "label": example.labels[label][0],
            }
            for example, label, nll in zip(examples, chosen, scores.nll, strict=True)
        ]

    def label_scores(self, examples: Sequence[Example], prompt: Prompt | str) -> LabelScores:
        """Compute the class probabilities of prepared examples."""
        return label_scores(self.language_model, examples, prompt, self.lm_config.calibrate_labels)

    def _log_rows(self, split: str, batch: Batch, rows: list[dict[str, Any]]) -> None:
        for member in ("", *batch.members):
            mine = [row for row, example in zip(rows, batch.examples, strict=True) if member in ("", example.member)]
            name = f"{split}/{member}" if member else split
            if not (count := len(mine)):
                continue
            if all(row["nll"] is not None for row in mine):  # some servers return none
                self.log_mean(f"{name}/nll", sum(row["nll"] for row in mine) / count, count, name == "val")
            correct = sum(float(row["correct"]) for row in mine) / count
            self.log_mean(f"{name}/exact_match", correct, count, prog_bar=name == "val")
            if right := [float(row["correct"]) for row in mine if "label" in row]:
                self.log_mean(f"{name}/accuracy", sum(right) / len(right), len(right))
            self.log(f"{name}/examples", float(count), reduce_fx="sum", **PLACES)

    @torch.no_grad()
    def _log_relaxed(self, split: str, batch: Batch) -> None:
        nll = self.map_across_ranks(batch.examples, self._relaxed_nll)
        if nll:
            self.log_mean(f"{split}/relaxed_nll", sum(nll) / len(nll), len(batch))

    def _relaxed_nll(self, examples: Sequence[Example]) -> list[float]:
        relaxed = self.relaxed_prompt_for(examples)
        return [] if relaxed is None else self.lm.score(examples, relaxed).nll.tolist()

    def log_mean(self, name: str, value: float | Tensor, count: int, prog_bar: bool = False) -> None:
        """Log the mean over a batch of ``count`` examples; Lightning averages it over all examples of the split.

        All processes know all rows of a batch, so nothing is synchronised.
        """
        self.log(name, value, batch_size=count, prog_bar=prog_bar, **PLACES)

    def evaluate_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Return the rows of `evaluate` for the method's own prompts; processes share the work."""
        return self.map_across_ranks(examples, lambda part: self.evaluate(part, self.prompt_for(part)))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Log NLL and exact match on the validation split."""
        del batch_idx
        rows = self.evaluate_batch(batch.examples)
        self._log_rows("val", batch, rows)
        self._log_relaxed("val", batch)
        return {"rows": rows}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Log NLL, exact match and count on each test set, and return the rows for ``predictions.jsonl``."""
        del batch_idx, dataloader_idx
        rows = self.evaluate_batch(batch.examples)
        self._log_rows(batch.split, batch, rows)
        self._log_relaxed(batch.split, batch)
        return {"rows": [{"split": batch.split, **row} for row in rows]}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of `evaluate`; questions need no answers."""
        del batch_idx
        return {"rows": self.evaluate_batch(batch.examples)}
