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

NOT_TEXT = 1000.0  # nats; more than any prompt's NLL, so that tokens which text can hold always win


class DiscretePromptMethod(PromptMethod):
    """A prompt of token ids.

    Training validates the tokens as they are; the best of them, those that it starts from included, are kept in the
    checkpoint, whichever one it is, and are what `test` and `predict` use. One number says which are the best, here and
    for ``best.ckpt``: ``val/selection_loss``, which is ``val/nll``, plus `NOT_TEXT` for tokens that become others once
    they are written as text. A subclass calls `keep_ids` from `build_prompt` and gives its tokens in `token_ids`.
    """

    monitor = ("val/selection_loss", "min")

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
            scored = [
                self.map_across_ranks(batch, lambda part: self.lm.score(part, prompt).nll.tolist()) for batch in batches
            ]
            nll = [value for values in scored for value in values]
        self.keep_better(sum(nll) / len(nll))

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
        loss = self.keep_better(self._totals[0] / self._totals[1])
        self.log("val/selection_loss", loss, batch_size=1)

    def keep_better(self, nll: float) -> float:
        """Keep the tokens of now if they are better than the best so far.

        Args:
            nll: Their NLL on validation.

        Returns:
            Their selection loss.
        """
        ids = self.token_ids()
        survive = survives(self.lm, ids[None])[0].cpu()
        loss, best = (selection_loss(*pair) for pair in ((nll, survive), (self.best_nll, self.best_survives)))
        if loss < best:
            self.best_nll.fill_(nll)
            self.best_ids.copy_(ids)
            self.best_survives.copy_(survive)
        return float(loss)

    def on_fit_end(self) -> None:
        """Say it if the result cannot be taken home as text."""
        if not torch.isinf(self.best_nll) and not self.best_survives:
            log.warning("the best tokens (%s) become others when their text %r is tokenised again",
                        " ".join(map(str, self.best_ids.tolist())), self.prompt_text())  # fmt: skip


def selection_loss(nll: float | Tensor, survives: Tensor) -> Tensor:
    """What says which tokens are the best; float32, as metrics are.

    Args:
        nll: Their NLL on validation.
        survives: Whether they are the same tokens again once they were written as text.
    """
    return torch.as_tensor(nll, dtype=torch.float32, device="cpu") + NOT_TEXT * ~survives.cpu()
