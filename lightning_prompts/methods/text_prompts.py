"""The base class of methods that improve the text prompts of a network of LM calls, without gradients."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prompts.dln.cached_lm import CachedLM, CheckpointedCache
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.network import LanguageNetwork
from lightning_prompts.errors import UserError, check_at_least, check_finite
from lightning_prompts.lm import LabelScores, LMConfig, LMShape, MemoryEstimate, Prompt
from lightning_prompts.methods.best import KeepsBest
from lightning_prompts.methods.evaluation import Monitor
from lightning_prompts.methods.training import SearchOptimizer
from lightning_prompts.types import Batch, Example

log = logging.getLogger(__name__)

STATE = "text_prompts"


class TextPromptMethod(KeepsBest):
    """Text prompts of a network of layers, selected by validation accuracy.

    A subclass implements `improve`, which improves ``prompts`` on a batch. `test` and `predict` use the best prompts by
    validation. Every checkpoint holds them, with the memory, the cache and the messages' statistics.

    Args:
        layers: Layers from the input to the answer.
        text: Initial prompt of the top layer, which replaces the one in ``layers``; ``None`` keeps that one.
        memory: ``M``; see `PromptMemory`.
        tolerance: See `PromptMemory`.
        max_prompt_tokens: Maximum length of a prompt, in tokens; the context window must hold it with every example.
        proposer: The LM that writes proposals; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes.
        lm: The frozen language model of layers without their own.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
    """

    prompt_kind = "text"
    gradient_through_lm = False
    takes_server: ClassVar[bool] = True
    needs_validation: ClassVar[bool] = False  # each step chooses by validation
    monitor = Monitor("val/exact_match", "max")
    validated_by = "correct"

    def __init__(
        self,
        layers: Sequence[LanguageLayer],
        *,
        text: str | None = None,
        memory: int = 0,
        tolerance: int = -1,
        max_prompt_tokens: int,
        proposer: LMConfig | None,
        memory_mb: float,
        lm: LMConfig,
        max_new_tokens: int,
    ) -> None:
        """Check the settings and place the layers; LMs are loaded later."""
        top = layers[-1].lm if layers else None
        super().__init__(lm if top is None else top, max_new_tokens)
        if not layers:
            raise UserError("layers is empty; give at least one layer, as in layers: [{prompt: Answer the question.}]")
        if memory < 0:
            raise UserError(f"memory (M) must not be negative, got {memory}")
        if tolerance < -1:
            raise UserError(f"tolerance must be -1 (never go back to the best prompts) or more, got {tolerance}")
        check_at_least("max_prompt_tokens", max_prompt_tokens)
        check_finite("memory_mb", memory_mb, above=True)
        if not any(layer.learn for layer in layers):
            raise UserError("no layer learns; set learn: true for one of layers, or test FixedPrompt or ChainOfThought")
        if text is not None:
            layers = [*layers[:-1], replace(layers[-1], prompt=text)]
        self.layer_settings = list(layers)
        self.placed = [PlacedLayer(layer, index, len(layers)) for index, layer in enumerate(layers)]
        self.default_lm, self.proposer_config = lm, proposer
        self.max_prompt_tokens, self.memory_mb = max_prompt_tokens, memory_mb
        self.initial_prompts = [layer.prompt or "" for layer in layers]
        self.prompts = list(self.initial_prompts)
        self.prompt_memory = PromptMemory(memory, tolerance)
        self.message_stats = [BanditStats() for _ in layers]
        self.cache = CheckpointedCache()
        self.scored_under: dict[str, Any] | None = None  # `score_settings` of the candidates' scores so far
        self.step_rows: list[dict[str, Any]] = []
        self.validation_rows: list[dict[str, Any]] = []

    @abstractmethod
    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Improve ``prompts`` on a batch, and return the candidates as rows of a table."""

    # --- the LMs ----------------------------------------------------------------------------------------------------

    @property
    def layer_lms(self) -> list[LMConfig]:
        """The settings of each layer's LM, from the layer that reads the input to the one that answers."""
        return [layer.lm or self.default_lm for layer in self.layer_settings]

    def other_lms(self) -> list[LMConfig]:
        """See `PromptMethod`; return the LMs of hidden layers and the proposer."""
        configs = [*self.layer_lms, self.proposer_config or self.default_lm]
        return list(dict.fromkeys(config for config in configs if config != self.lm_config))

    def build_prompt(self) -> None:
        """Give each layer its LM, with a cache in front of it, and its initial prompt."""
        # Lightning counts the steps of an optimiser over this parameter.
        self.handle = torch.nn.Parameter(torch.zeros(1, device="cpu"))
        configs = [*self.layer_lms, self.proposer_config or self.default_lm]
        self.cached_lms = {
            config: CachedLM(
                lm, lm.identity(config), self.cache, self.memory_mb, config.calibrate_labels, self.map_across_ranks
            )
            for config, lm in self.lms.items()
        }
        *layers, self.proposer = [self.cached_lms[config] for config in configs]
        self.network = LanguageNetwork(self.placed, layers, self.max_new_tokens)
        own = self.task_instruction()
        self.initial_prompts = [own if layer.prompt is None else layer.prompt for layer in self.layer_settings]
        self.prompts = list(self.initial_prompts)
        for prompt, cached in zip(self.initial_prompts, layers, strict=True):
            if (count := cached.lm.count(prompt)) > self.max_prompt_tokens:
                raise UserError(
                    f"the initial prompt {prompt[:40]!r} has {count} tokens, more than max_prompt_tokens "
                    f"({self.max_prompt_tokens}); raise it"
                )

    def configure_model(self) -> None:
        """See `PromptMethod`; check servers before training writes files."""
        super().configure_model()
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_servers()

    @property
    def calls(self) -> int:
        """Number of texts that the LMs have scored or written, in all processes."""
        return sum(cached.calls for cached in self.cached_lms.values())

    # --- prompts ----------------------------------------------------------------------------------------------------

    def active_prompts(self) -> list[str]:
        """Return the prompts to use: the current ones during training, the best by validation afterwards."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self.prompts if fitting or self.prompt_memory.best is None else self.prompt_memory.best

    def current_prompt(self) -> Tensor:
        """Return the embeddings of the top layer's prompt, ``[P, D]``; see `LanguageModel.text_vectors`."""
        return self.language_model.text_vectors(self.active_prompts()[-1])

    def prompt_text(self) -> str:
        """Return the best prompts so far, layer by layer."""
        prompts = self.prompt_memory.best or self.prompts
        if len(prompts) == 1:
            return prompts[0]
        return "\n\n".join(f"[layer {index}]\n{text}" for index, text in enumerate(prompts))

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        lengths = [len(shape.encoder.tokens(prompt)) for prompt in self.initial_prompts]
        return MemoryEstimate(length=max(lengths))

    def describe_trained(self) -> str:
        """Return the number of learned prompts as text."""
        learning = sum(layer.learn for layer in self.layer_settings)
        return f"{learning} of {len(self.layer_settings)} layers' prompts"

    def proposed(self) -> list[dict[str, Any]]:
        """Return the candidates of the last step with their rewards."""
        return self.step_rows

    def validated(self) -> list[dict[str, Any]]:
        """Return the prompts of the last validation, their accuracy, and the best accuracy so far."""
        return self.validation_rows

    # --- training ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> SearchOptimizer:
        """Return an optimiser that only lets the Trainer count steps; `training_step` does the work."""
        return SearchOptimizer([self.handle], lambda: None)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there is no gradient."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Improve the prompts on a batch."""
        del batch_idx
        for example in batch.examples:
            if example.reference is None and example.answer is None:
                raise UserError(f"{example.source or 'example'} has no answer to learn from; use predict for it")
        with torch.no_grad():
            self.step_rows = self.improve(batch.examples)
        self.log("train/calls", float(self.calls), prog_bar=True)
        self.log("train/tokens", self.data_parallel_rank.all_reduce(self.tokens_forwarded)[0], prog_bar=True)
        return self.handle.sum() * 0  # Lightning needs a loss with a gradient

    def setup(self, stage: str) -> None:
        """Check the run before it writes files.

        Raises:
            UserError: The run accumulates gradients, but the method has none; or the method needs validation, and there
                is none.
        """
        if stage == "fit" and self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"{type(self).__name__} has no gradients to accumulate; leave out trainer.accumulate_grad_batches, and "
                "raise data.batch_size for larger steps"
            )
        if stage == "fit" and self.needs_validation and not self.validation_batches():
            raise UserError(
                f"{type(self).__name__} chooses by validation, and there is none; give data a validation split, and "
                "leave trainer.limit_val_batches above 0"
            )

    def validate_initial(self) -> None:
        """See `KeepsBest`."""
        if self.prompt_memory.best is not None:
            return
        batches = self.validation_batches()
        if batches:
            rows = [row for batch in batches for row in self.evaluate_batch(batch)]
            self.prompt_memory.update(self.prompts, sum(bool(row["correct"]) for row in rows) / len(rows))

    def check_servers(self) -> None:
        """Raise a `UserError` if a server does not support training, before any paid request.

        Only training needs all servers: evaluation does not use the proposer.
        """
        for lm in self.lms.values():
            lm.connect()

    def keeps_prompt(self, layer: int) -> None:
        """Warn that a step has no usable proposal for a layer."""
        log.warning(
            "step %d: no proposal for layer %d was new, short enough and not empty; its prompt stays",
            self.trainer.global_step,
            layer,
        )

    # --- evaluation -------------------------------------------------------------------------------------------------

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """Generate the texts of the lower layers, and place the examples in the top layer."""
        hidden = self.network.sample_hidden(examples, self.active_prompts())
        return self.network.place_top(examples, hidden)

    def added_tokens(self) -> int:
        """See `Evaluation`; count the longest prompt, and the hidden texts and templates of several layers."""
        hidden = [2 * layer.max_new_tokens + 64 for layer in self.layer_settings[:-1]]
        return self.max_prompt_tokens - self.prompt_length + max(hidden, default=0)

    def evaluate_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """See `PromptMethod`; processes share the work of each LM call, so all caches get all answers."""
        return self.evaluate(examples, self.active_prompts()[-1])

    @property
    def _top(self) -> CachedLM:
        """The LM that answers."""
        return self.network.lms[-1]

    @property
    def _pays(self) -> bool:
        """Whether a server answers; if so, every text goes through the cache."""
        return self.lm_config.server is not None

    def _generate(self, examples: Sequence[Example], prompt: Prompt | str) -> list[dict[str, Any]]:
        if self._pays:  # the cache shares the work
            return super()._generate(examples, prompt)
        return self.map_across_ranks(examples, lambda part: super(TextPromptMethod, self)._generate(part, prompt))

    def label_scores(self, examples: Sequence[Example], prompt: Prompt | str) -> LabelScores:
        """See `PromptMethod`; known scores come from the cache."""
        return self._top.label_scores(examples, self.active_prompts()[-1])

    def write_answers(self, examples: Sequence[Example], prompt: Prompt | str) -> list[str]:
        """See `PromptMethod`; known answers of a server come from the cache."""
        if not self._pays:
            return super().write_answers(examples, prompt)
        return self._top.write(examples, self.active_prompts()[-1], self.max_new_tokens)

    def answer_nll(self, examples: Sequence[Example], prompt: Prompt | str) -> Sequence[float | None]:
        """See `PromptMethod`; known scores of a server come from the cache."""
        if not self._pays or not self.language_model.can_score(examples):
            return super().answer_nll(examples, prompt)
        texts = [[str(example.answer)] for example in examples]
        return [-value for value in self._top.log_probs(examples, self.active_prompts()[-1:], texts).flatten().tolist()]

    def keep(self, value: float) -> None:
        """Keep the prompts if they are strictly better than the best, or return to the best; see `PromptMemory`."""
        self.log("val/best_accuracy", max(value, self.prompt_memory.best_accuracy))
        before = self.prompts
        self.prompts = self.prompt_memory.update(before, value)
        self.validation_rows = [
            {
                "kind": "validation",
                "prompts": before,
                "accuracy": round(value, 5),
                "best_accuracy": round(self.prompt_memory.best_accuracy, 5),
                "back_to_best": self.prompts != before,
            }
        ]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; the layers must agree, and prompts may have any length."""
        meta = super().checkpoint_meta()
        del meta["length"]
        hidden = [config.name for config in self.layer_lms[:-1]]
        return {
            **meta,
            **({"hidden layers' model": " | ".join(hidden)} if hidden else {}),
            "layers": len(self.layer_settings),
            "templates": repr([layer.template for layer in self.placed]),
        }

    def validation_hash(self) -> str:
        """Return a digest of the validation examples, for the checkpoint of a method that keeps scores on them."""
        examples = self.validation_examples()
        return hashlib.blake2b(repr([example.identity for example in examples]).encode(), digest_size=8).hexdigest()

    def score_settings(self) -> dict[str, Any]:
        """Return what the scores of candidates depend on, apart from the LM."""
        return {"validation examples": self.validation_hash(), "max_new_tokens": self.max_new_tokens}

    def on_fit_start(self) -> None:
        """See `KeepsBest`.

        Raises:
            UserError: Candidates have scores from an earlier training that new ones cannot be compared with.
        """
        if self.needs_validation:
            now, known = self.score_settings(), self.scored_under
            if changed := [name for name in now if known and known[name] != now[name]]:
                raise UserError(
                    f"the candidates were scored with other {' and '.join(changed)}; continue with the data settings, "
                    "trainer.limit_val_batches and model settings of the run that scored them, or start anew"
                )
            self.scored_under = now
        super().on_fit_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the prompts, the memory, the statistics and the cache."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE] = {
            "initial": list(self.initial_prompts),
            "prompts": list(self.prompts),
            "memory": self.prompt_memory.state(),
            "message_stats": [stats.state() for stats in self.message_stats],
            "cache": self.cache.state(),
            "scored_under": self.scored_under,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the prompts, the memory, the statistics and the cache."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE]
        self.initial_prompts, self.prompts = list(state["initial"]), list(state["prompts"])
        self.prompt_memory.load(state["memory"])
        for stats, known in zip(self.message_stats, state["message_stats"], strict=True):
            stats.load(known)
        self.cache.load(state["cache"])
        self.scored_under = state.get("scored_under")
