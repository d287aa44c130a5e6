"""The base class of methods with token prompts; the result is the best tokens by validation."""

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

NOT_TEXT = 1000.0  # nats; more than any prompt's NLL, so tokens that survive a round trip through text always win


class DiscretePromptMethod(KeepsBest):
    """A prompt of token ids.

    Training validates the current tokens. Every checkpoint holds the best tokens so far, and `test` and `predict` use
    them; the initial tokens count as well. ``val/selection_loss`` decides which tokens are the best, here and for
    ``best.ckpt``: it is ``val/nll``, plus `NOT_TEXT` if the text of the tokens is tokenised to other tokens. A subclass
    calls `keep_ids` from `build_prompt` and returns its tokens from `token_ids`.
    """

    monitor = Monitor("val/selection_loss", "min")
    validated_by = "nll"

    best_ids: Tensor
    best_nll: Tensor
    best_round_trips: Tensor

    @abstractmethod
    def token_ids(self) -> Tensor:
        """Return the current tokens, ``[P]``."""

    def keep_ids(self, length: int) -> None:
        """Register buffers for the best tokens."""
        self.register_buffer("best_ids", torch.zeros(length, dtype=torch.long, device=self.lm.device))
        self.register_buffer("best_nll", torch.tensor(float("inf"), device=self.lm.device))
        self.register_buffer("best_round_trips", torch.tensor(False, device=self.lm.device))

    def chosen_ids(self) -> Tensor:
        """Return the tokens to use, ``[P]``: the current ones during training, the best by validation afterwards."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self.token_ids() if fitting or torch.isinf(self.best_nll) else self.best_ids

    def current_prompt(self) -> Tensor:
        """Return the embeddings of the tokens, ``[P, D]``."""
        return self.lm.embed(self.chosen_ids()).float()

    def prompt_text(self) -> str:
        """Return the text of the best tokens so far."""
        return self.lm.text(self.token_ids() if torch.isinf(self.best_nll) else self.best_ids)

    def validate_initial(self) -> None:
        """See `KeepsBest`."""
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
        """Keep the current tokens if they are better than the best so far.

        Args:
            nll: Validation NLL of the current tokens.

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
        """Warn if the text of the result is tokenised to other tokens."""
        if not torch.isinf(self.best_nll) and not self.best_round_trips:
            log.warning(
                "the best tokens (%s) become others when their text %r is tokenised again",
                " ".join(map(str, self.best_ids.tolist())),
                self.prompt_text(),
            )


def selection_loss(nll: float | Tensor, as_text: Tensor) -> Tensor:
    """Compute the loss that selects the best tokens, in float32 like the metrics.

    Args:
        nll: Validation NLL of the tokens.
        as_text: Whether the text of the tokens is tokenised to the same tokens.
    """
    return torch.as_tensor(nll, dtype=torch.float32, device="cpu") + NOT_TEXT * ~as_text.cpu()
