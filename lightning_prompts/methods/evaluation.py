"""What every method does on the validation and test splits and in prediction: answers, their scores, the metrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prompts.answers import is_correct
from lightning_prompts.lm import LabelScores, LMConfig, Prompt, label_scores
from lightning_prompts.lm.labels import HIDDEN
from lightning_prompts.methods.distributed import Distributed
from lightning_prompts.types import Batch, Example


class Evaluation(Distributed):
    """Validation, test and prediction. A subclass gives `prompt_for` and may change `prepare`."""

    lm_config: LMConfig
    max_new_tokens: int

    @abstractmethod
    def prompt_for(self, examples: Sequence[Example]) -> Prompt:
        """The prompt for some examples, the same for all or one for each, ``[B, P, D]``."""

    def relaxed_prompt_for(self, examples: Sequence[Example]) -> Tensor | None:
        """What is trained in place of tokens for some examples, where that is something else: ``relaxed_nll``."""
        del examples
        return None

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """What examples become before the LM sees them in evaluation: unchanged, unless a method adds text."""
        return list(examples)

    def added_tokens(self) -> int:
        """At most how many tokens `prepare` adds to an example."""
        return 0

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example], prompt: Prompt) -> list[dict[str, Any]]:
        """Score and generate answers, or choose among classes where there are any.

        Args:
            examples: ``B`` examples, with or without reference answers.
            prompt: ``[P, D]`` or ``[B, P, D]``, or keys and values.

        Returns:
            One row per example: question, answer, generated, nll (nats per answer token), correct; the last two are
            ``None`` without a reference. Where the answer is a class: label, the likeliest one, which is what was
            generated. Where the method has thought about the question: hidden, the thoughts.
        """
        prepared = self.prepare(examples)
        rows: list[dict[str, Any]] = [{} for _ in examples]
        for labelled, judge in ((True, self._classify), (False, self._generate)):
            mine = [index for index, example in enumerate(examples) if bool(example.labels) == labelled]
            if mine:
                own = prompt[mine] if isinstance(prompt, Tensor) and prompt.dim() == 3 else prompt
                for index, row in zip(mine, judge([prepared[index] for index in mine], own), strict=True):
                    rows[index] = row
        for row, example, shown in zip(rows, examples, prepared, strict=True):
            if HIDDEN in shown.fields and HIDDEN not in example.fields:
                row[HIDDEN] = shown.fields[HIDDEN]
        return rows

    def _generate(self, examples: Sequence[Example], prompt: Prompt) -> list[dict[str, Any]]:
        """Rows of examples whose answer is free text."""
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

    def write_answers(self, examples: Sequence[Example], prompt: Prompt) -> list[str]:
        """The LM's greedy answers to prepared examples."""
        return self.lm.generate(examples, prompt, self.max_new_tokens)

    def answer_nll(self, examples: Sequence[Example], prompt: Prompt) -> Sequence[float | None]:
        """NLL of prepared examples' answers, in nats per token; ``None`` where the LM does not say."""
        nll: list[float] = self.lm.score(examples, prompt).nll.tolist()
        return nll

    def _classify(self, examples: Sequence[Example], prompt: Prompt) -> list[dict[str, Any]]:
        """Rows of examples whose answer is a class: the likeliest one is the answer, and nothing is generated."""
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

    def label_scores(self, examples: Sequence[Example], prompt: Prompt) -> LabelScores:
        """What the LM thinks of the classes of prepared examples, as `evaluate` asks it."""
        return label_scores(self.lm, examples, prompt, self.lm_config.calibrate_labels)

    def _log_rows(self, split: str, batch: Batch, rows: list[dict[str, Any]]) -> None:
        for member in ("", *batch.members):
            mine = [row for row, example in zip(rows, batch.examples, strict=True) if member in ("", example.member)]
            name = f"{split}/{member}" if member else split
            if not (count := len(mine)):
                continue  # of a member that no batch has, nothing is said
            if all(row["nll"] is not None for row in mine):  # some servers do not say
                self.log_mean(f"{name}/nll", sum(row["nll"] for row in mine) / count, count, name == "val")
            correct = sum(float(row["correct"]) for row in mine) / count
            self.log_mean(f"{name}/exact_match", correct, count, prog_bar=name == "val")
            if right := [float(row["correct"]) for row in mine if "label" in row]:
                self.log_mean(f"{name}/accuracy", sum(right) / len(right), len(right))
            self.log(f"{name}/examples", float(count), reduce_fx="sum", on_epoch=True, on_step=False,
                     add_dataloader_idx=False)  # fmt: skip

    @torch.no_grad()
    def _log_relaxed(self, split: str, batch: Batch) -> None:
        nll = self.map_across_ranks(batch.examples, self._relaxed_nll)
        if nll:
            self.log_mean(f"{split}/relaxed_nll", sum(nll) / len(nll), len(batch))

    def _relaxed_nll(self, examples: Sequence[Example]) -> list[float]:
        relaxed = self.relaxed_prompt_for(examples)
        return [] if relaxed is None else self.lm.score(examples, relaxed).nll.tolist()

    def log_mean(self, name: str, value: float | Tensor, count: int, prog_bar: bool = False) -> None:
        """Log the mean over a batch of ``count`` examples, to be averaged over all examples of the split.

        All processes know all rows of a batch, so they come to the same and need not ask each other.
        """
        # A test set's name is part of the metric's, so Lightning need not number the dataloaders.
        self.log(name, value, batch_size=count, on_epoch=True, on_step=False, prog_bar=prog_bar,
                 add_dataloader_idx=False)  # fmt: skip

    def evaluate_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The rows of `evaluate` under the method's own prompts, each process having done its share."""
        return self.map_across_ranks(examples, lambda part: self.evaluate(part, self.prompt_for(part)))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """NLL and exact match on the validation split."""
        del batch_idx
        rows = self.evaluate_batch(batch.examples)
        self._log_rows("val", batch, rows)
        self._log_relaxed("val", batch)
        return {"rows": rows}

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, list[dict[str, Any]]]:
        """NLL, exact match and count on each test set; the rows go to ``predictions.jsonl``."""
        del batch_idx, dataloader_idx
        rows = self.evaluate_batch(batch.examples)
        self._log_rows(batch.split, batch, rows)
        self._log_relaxed(batch.split, batch)
        return {"rows": [{"split": batch.split, **row} for row in rows]}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """Generations, for questions without answers too."""
        del batch_idx
        return {"rows": self.evaluate_batch(batch.examples)}
