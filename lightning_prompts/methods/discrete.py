"""What methods share whose prompt is tokens: the best tokens so far by validation are the result."""

from __future__ import annotations

import logging
from abc import abstractmethod

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prompts.methods.best import KeepsBest
from lightning_prompts.methods.evaluation import Monitor
from lightning_prompts.search.candidates import round_trips

log = logging.getLogger(__name__)

NOT_TEXT = 1000.0  # nats; more than any prompt's NLL, so that tokens which text can hold always win


class DiscretePromptMethod(KeepsBest):
    """A prompt of token ids.

    Training validates the tokens as they are; the best of them, those that it starts from included, are kept in the
    checkpoint, whichever one it is, and are what `test` and `predict` use. One number says which are the best, here and
    for ``best.ckpt``: ``val/selection_loss``, which is ``val/nll``, plus `NOT_TEXT` for tokens that become others once
    they are written as text. A subclass calls `keep_ids` from `build_prompt` and gives its tokens in `token_ids`.
    """

    monitor = Monitor("val/selection_loss", "min")
    validated_by = "nll"

    best_ids: Tensor
    best_nll: Tensor
    best_round_trips: Tensor

    @abstractmethod
    def token_ids(self) -> Tensor:
        """The tokens as they are now, ``[P]``."""

    def keep_ids(self, length: int) -> None:
        """Make room for the best tokens."""
        self.register_buffer("best_ids", torch.zeros(length, dtype=torch.long, device=self.lm.device))
        self.register_buffer("best_nll", torch.tensor(float("inf"), device=self.lm.device))
        self.register_buffer("best_round_trips", torch.tensor(False, device=self.lm.device))

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

    def keep(self, value: float) -> None:
        """See `KeepsBest`."""
        self.log("val/selection_loss", self.keep_better(value), batch_size=1)

    def keep_better(self, nll: float) -> float:
        """Keep the tokens of now if they are better than the best so far.

        Args:
            nll: Their NLL on validation.

        Returns:
            Their selection loss.
        """
        ids = self.token_ids()
        as_text = round_trips(self.lm, ids[None])[0].cpu()
        loss = float(selection_loss(nll, as_text))
        if self.monitor.better(loss, float(selection_loss(self.best_nll, self.best_round_trips))):
            self.best_nll.fill_(nll)
            self.best_ids.copy_(ids)
            self.best_round_trips.copy_(as_text)
        return loss

    def on_fit_end(self) -> None:
        """Say it if the result cannot be taken home as text."""
        if not torch.isinf(self.best_nll) and not self.best_round_trips:
            log.warning(
                "the best tokens (%s) become others when their text %r is tokenised again",
                " ".join(map(str, self.best_ids.tolist())),
                self.prompt_text(),
            )


def selection_loss(nll: float | Tensor, as_text: Tensor) -> Tensor:
    """The loss that tells the best tokens; float32, as metrics are.

    Args:
        nll: The tokens' NLL on validation.
        as_text: Whether their text is tokenised to the same tokens again.
    """
    return torch.as_tensor(nll, dtype=torch.float32, device="cpu") + NOT_TEXT * ~as_text.cpu()
