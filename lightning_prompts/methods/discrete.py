"""What methods share whose prompt is tokens: the best tokens so far by validation are the result."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.search.candidates import survives
from lightning_prompts.types import Batch

log = logging.getLogger(__name__)


class DiscretePromptMethod(PromptMethod):
    """A prompt of token ids.

    Training validates the tokens as they are; the best of them, those that it starts from included, are kept in the
    checkpoint, whichever one it is, and are what `test` and `predict` use. Tokens that become others once they are
    written as text are kept only as long as there are none that don't. A subclass calls `keep_ids` from `build_prompt`
    and gives its tokens in `token_ids`.
    """

    best_ids: Tensor
    best_nll: Tensor
    best_survives: Tensor

    @abstractmethod
    def token_ids(self) -> Tensor:
        """The tokens as they are now, ``[P]``."""

    def keep_ids(self, length: int) -> None:
        """Make room for the best tokens."""
        self.register_buffer("best_ids", torch.zeros(length, dtype=torch.long, device=self.lm.device))
        self.register_buffer("best_nll", torch.tensor(float("inf"), device=self.lm.device))
        self.register_buffer("best_survives", torch.tensor(False, device=self.lm.device))
        self._totals = [0.0, 0.0]

    def chosen_ids(self) -> Tensor:
        """The tokens to use, ``[P]``: while training those of now, afterwards the best by validation."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self.token_ids() if fitting or torch.isinf(self.best_nll) else self.best_ids

    def current_prompt(self) -> Tensor:
        """The embeddings of the tokens, ``[P, D]``."""
        return self.lm.embed(self.chosen_ids()).float()

    def prompt_text(self) -> str:
        """The best tokens so far, as text."""
        return self.lm.text(self.token_ids() if torch.isinf(self.best_nll) else self.best_ids)

    def on_fit_start(self) -> None:
        """The tokens to start from are the first to be the best."""
        batches = self.validation_batches()
        if not batches or not torch.isinf(self.best_nll):
            return
        with torch.no_grad():
            prompt = self.current_prompt()
            nll = [value for batch in batches
                   for value in self.spread(batch, lambda part: self.lm.score(part, prompt).nll.tolist())]  # fmt: skip
        self._keep_better(torch.tensor(sum(nll) / len(nll), device="cpu"))

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._totals = [0.0, 0.0]

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """NLL and exact match of the tokens on the validation split."""
        output = super().validation_step(batch, batch_idx)
        self._totals[0] += sum(row["nll"] for row in output["rows"])
        self._totals[1] += len(output["rows"])
        return output

    def on_validation_epoch_end(self) -> None:
        """Keep the tokens if no earlier ones were better."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        self._keep_better(torch.tensor(self._totals[0] / self._totals[1], device="cpu"))

    def _keep_better(self, nll: Tensor) -> None:
        """Keep the tokens of now if they are better than the best so far: first as text, then by ``nll``."""
        ids = self.token_ids()
        survive = survives(self.lm, ids[None])[0]
        if (not survive, float(nll)) < (not self.best_survives, float(self.best_nll)):
            self.best_nll.copy_(nll)
            self.best_ids.copy_(ids)
            self.best_survives.copy_(survive)

    def on_fit_end(self) -> None:
        """Say it if the result cannot be taken home as text."""
        if not torch.isinf(self.best_nll) and not self.best_survives:
            log.warning("the best tokens (%s) become others when their text %r is tokenised again",
                        " ".join(map(str, self.best_ids.tolist())), self.prompt_text())  # fmt: skip
