"""What methods share whose prompts are texts of a network of LM calls, improved without gradients."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prompts.dln.cache import TextCache
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.memory import PromptMemory
from lightning_prompts.dln.messages import BanditStats
from lightning_prompts.dln.network import LanguageNetwork
from lightning_prompts.dln.reader import Reader, identity
from lightning_prompts.dln.remote_reader import RemoteReader
from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import FrozenLM, LabelScores, LMConfig, LMShape, MemoryEstimate, Prompt, RemoteLM, Usage
from lightning_prompts.methods.base import PromptMethod
from lightning_prompts.search.optimizer import SearchOptimizer
from lightning_prompts.types import Batch, Example

log = logging.getLogger(__name__)

STATE = "text_prompts"


class TextPromptMethod(PromptMethod):
    """Text prompts of a network of layers, kept by validation accuracy.

    A subclass gives `improve`, which changes ``prompts`` for the better on a batch. The best prompts by validation are
    in every checkpoint, with the memory, the cache and what the messages have brought, and are what `test` and
    `predict` use.

    Args:
        layers: From the one that reads the input to the one that answers.
        text: The top layer's prompt to start from, in the place of what ``layers`` says; ``None`` for that.
        memory: ``M``; see `PromptMemory`.
        tolerance: See `PromptMemory`.
        max_prompt_tokens: No prompt gets longer, so that every example fits the context window with it.
        proposer: The LM that writes proposals; ``None`` for the method's own.
        memory_mb: Megabytes that one scoring pass may take, about.
        lm: The frozen language model of the layers that name none.
        max_new_tokens: How long an answer in free text may get.
    """

    prompt_kind = "text"
    gradient_through_lm = False
    takes_server: ClassVar[bool] = True
    monitor = ("val/exact_match", "max")

    def __init__(
        self,
        layers: Sequence[LanguageLayer],
        text: str | None,
        memory: int,
        tolerance: int,
        max_prompt_tokens: int,
        proposer: LMConfig | None,
        memory_mb: float,
        lm: LMConfig,
        max_new_tokens: int,
    ) -> None:
        """Place the layers; LMs are loaded later."""
        top = layers[-1].lm if layers else None
        super().__init__(lm if top is None else top, max_new_tokens)
        if not layers:
            raise UserError("layers is empty; give at least one layer, as in layers: [{prompt: Answer the question.}]")
        if memory < 0:
            raise UserError(f"memory (M) must not be negative, got {memory}")
        if tolerance < -1:
            raise UserError(f"tolerance must be -1 (never go back to the best prompts) or more, got {tolerance}")
        if max_prompt_tokens < 1:
            raise UserError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
        check_finite("memory_mb", memory_mb, above=True)
        if text is not None:
            layers = [*layers[:-1], replace(layers[-1], prompt=text)]
        self.layer_settings = list(layers)
        self.placed = [PlacedLayer(layer, index, len(layers)) for index, layer in enumerate(layers)]
        self.default_lm, self.proposer_config = lm, proposer
        self.max_prompt_tokens, self.memory_mb = max_prompt_tokens, memory_mb
        self.initial_prompts = [layer.prompt or "" for layer in layers]
        self.prompts = list(self.initial_prompts)
        self.prompt_memory = PromptMemory(memory, tolerance)
        self.arms = [BanditStats() for _ in layers]
        self.cache = TextCache()
        self.step_rows: list[dict[str, Any]] = []
        self.validation_rows: list[dict[str, Any]] = []
        self._right = [0.0, 0.0]

    @abstractmethod
    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Change ``prompts`` on a batch; the candidates as rows of a table."""

    # --- the LMs ----------------------------------------------------------------------------------------------------

    @property
    def layer_lms(self) -> list[LMConfig]:
        """The LM of each layer, from the one that reads the input to the one that answers."""
        return [layer.lm or self.default_lm for layer in self.layer_settings]

    def other_lms(self) -> list[LMConfig]:
        """See `PromptMethod`: of hidden layers, and the proposer."""
        configs = [*self.layer_lms, self.proposer_config or self.default_lm]
        return list(dict.fromkeys(config for config in configs if config != self.lm_config))

    def build_prompt(self) -> None:
        """Put the layers on the LMs."""
        # Lightning counts the steps of an optimiser over it.
        self.handle = torch.nn.Parameter(torch.zeros(1, device="cpu"))
        configs = [*self.layer_lms, self.proposer_config or self.default_lm]
        self.readers: dict[LMConfig, Reader] = {}
        loaded: dict[LMConfig, FrozenLM | RemoteLM] = {**self.lms}
        self.others = torch.nn.ModuleList(
            lm for lm in loaded.values() if isinstance(lm, FrozenLM) and lm is not self.lm
        )
        for config in dict.fromkeys(configs):
            lm = loaded[config]
            self.readers[config] = (
                RemoteReader(lm, self.cache, config.calibrate_labels, self.map_across_ranks)
                if isinstance(lm, RemoteLM) else
                Reader(lm, identity(lm, config), self.cache, self.memory_mb, calibrate=config.calibrate_labels,
                       map_across_ranks=self.map_across_ranks)
            )  # fmt: skip
        self._check_shared()
        readers = [self.readers[config] for config in configs]
        self.network = LanguageNetwork(self.placed, readers[:-1], self.max_new_tokens)
        self.proposer = readers[-1]
        own = self.task_instruction()
        self.initial_prompts = [own if layer.prompt is None else layer.prompt for layer in self.layer_settings]
        self.prompts = list(self.initial_prompts)
        for prompt, reader in zip(self.initial_prompts, readers, strict=False):
            if (count := reader.lm.count(prompt)) > self.max_prompt_tokens:
                raise UserError(
                    f"the initial prompt {prompt[:40]!r} has {count} tokens, more than max_prompt_tokens "
                    f"({self.max_prompt_tokens}); raise it"
                )

    def configure_model(self) -> None:
        """See `PromptMethod`; ahead of training, servers are checked before anything is written."""
        super().configure_model()
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_servers()

    def _check_shared(self) -> None:
        """Raise a `UserError` if several processes share an LM in a way that the others asked do not go with."""
        asked = [reader.lm for reader in self.readers.values()]
        shards = [lm.shards for lm in asked if isinstance(lm, FrozenLM) and lm.shards is not None]
        mesh = None if self._trainer is None else getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is not None and mesh["tensor_parallel"].size() > 1 and any(isinstance(lm, RemoteLM) for lm in asked):
            raise UserError(
                f"{type(self).__name__} asks a server, and each of the processes that share an LM's heads would; set "
                "trainer.strategy.tensor_parallel_size to 1"
            )
        if len(asked) > 1 and any(each.lockstep is not None for each in shards):
            raise UserError(
                f"{type(self).__name__} asks several LMs, whose weights cannot be sharded over processes that work on "
                "different texts; set trainer.strategy.data_parallel_size to 1"
            )

    def load_lm(self, config: LMConfig, device: torch.device) -> FrozenLM:
        """See `PromptMethod`.

        Where it is behind a server, what follows asks its reader, and does without vectors.
        """
        return super().load_lm(config, device) if config.server is None else cast("FrozenLM", RemoteLM(config))

    @property
    def remote(self) -> RemoteLM | None:
        """The top layer's LM where it is behind a server."""
        lm = self.network.readers[-1].lm
        return lm if isinstance(lm, RemoteLM) else None

    @property
    def usage(self) -> Usage:
        """Of all LMs."""
        return sum((reader.lm.usage for reader in self.readers.values()), Usage())

    @property
    def calls(self) -> int:
        """Texts that LMs have scored or written, by all processes."""
        return sum(reader.calls for reader in self.readers.values())

    # --- prompts ----------------------------------------------------------------------------------------------------

    def active_prompts(self) -> list[str]:
        """The prompts to use: while training those of now, afterwards the best by validation."""
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return self.prompts if fitting or self.prompt_memory.best is None else self.prompt_memory.best

    def current_prompt(self) -> Tensor:
        """The embeddings of the top layer's prompt, ``[P, D]``; of no tokens where a server has them."""
        if self.remote is not None:
            return torch.zeros(0, 0, device="cpu")
        return self.lm.embed_text(self.active_prompts()[-1]).float()

    def prompt_text(self) -> str:
        """The best prompts so far, layer by layer."""
        prompts = self.prompt_memory.best or self.prompts
        if len(prompts) == 1:
            return prompts[0]
        return "\n\n".join(f"[layer {index}]\n{text}" for index, text in enumerate(prompts))

    def memory_estimate(self, shape: LMShape, batch_size: int) -> MemoryEstimate:
        """See `PromptMethod`."""
        lengths = [len(shape.encoder.tokens(prompt)) for prompt in self.initial_prompts]
        return MemoryEstimate(length=max(lengths))

    def describe_trained(self) -> str:
        """Texts, not numbers."""
        learning = sum(layer.learn for layer in self.layer_settings)
        return f"{learning} of {len(self.layer_settings)} layers' prompts"

    def proposed(self) -> list[dict[str, Any]]:
        """The candidates of the last step with their rewards."""
        return self.step_rows

    def validated(self) -> list[dict[str, Any]]:
        """The prompts of the last validation, their accuracy, and the best so far."""
        return self.validation_rows

    # --- training ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> SearchOptimizer:
        """A step of the Trainer's is a step of ours."""
        return SearchOptimizer([self.handle], lambda: None)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's arguments
        """None: there is no gradient."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Improve the prompts on a batch."""
        del batch_idx
        for example in batch.examples:
            if example.reference is None and example.answer is None:
                raise UserError(f"{example.source or 'example'} has no answer to learn from; use predict for it")
        with torch.no_grad():
            self.step_rows = self.improve(batch.examples)
        self.log("train/calls", float(self.calls), prog_bar=True)
        self.log("train/tokens", self.replica.all_reduce(self.tokens_forwarded)[0], prog_bar=True)
        return self.handle.sum() * 0  # Lightning follows a gradient; this one leads nowhere

    def setup(self, stage: str) -> None:
        """Find out before anything is written that a training cannot work.

        Raises:
            UserError: There are batches whose gradients are to be added up, where there are none.
        """
        if stage == "fit" and self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"{type(self).__name__} has no gradients to accumulate; leave out trainer.accumulate_grad_batches, and "
                "raise data.batch_size for larger steps"
            )

    def on_fit_start(self) -> None:
        """The prompts to start from are the first to be the best."""
        if self.prompt_memory.best is not None:
            return
        batches = self.validation_batches()
        if batches:
            rows = [row for batch in batches for row in self.evaluate_batch(batch)]
            self.prompt_memory.update(self.prompts, sum(bool(row["correct"]) for row in rows) / len(rows))

    def check_servers(self) -> None:
        """Raise a `UserError` if a server cannot do what training will ask of it, before anything is paid for.

        Only training needs them all: a proposer is not asked in evaluation.
        """
        for reader in self.readers.values():
            if isinstance(reader.lm, RemoteLM):
                reader.lm.connect()

    def keeps_prompt(self, layer: int) -> None:
        """Say that a step had nothing to choose from."""
        log.warning("step %d: no proposal for layer %d was new, short enough and not empty; its prompt stays",
                    self.trainer.global_step, layer)  # fmt: skip

    # --- evaluation -------------------------------------------------------------------------------------------------

    def prepare(self, examples: Sequence[Example]) -> list[Example]:
        """What the top layer reads, the layers below having written."""
        hidden = self.network.think(examples, self.active_prompts())
        return self.network.place_top(examples, hidden)

    def added_tokens(self) -> int:
        """At most: the longest prompt, and hidden texts and templates of several layers."""
        hidden = [2 * layer.max_new_tokens + 64 for layer in self.layer_settings[:-1]]
        return self.max_prompt_tokens - self.prompt_length + max(hidden, default=0)

    def evaluate_batch(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """See `PromptMethod`; the work is split where LMs are asked, so that all processes come to know the answers."""
        return self.evaluate(examples, self.current_prompt())

    def _generate(self, examples: Sequence[Example], prompt: Prompt) -> list[dict[str, Any]]:
        return self.map_across_ranks(examples, lambda part: super(TextPromptMethod, self)._generate(part, prompt))

    def label_scores(self, prepared: Sequence[Example], prompt: Prompt) -> LabelScores:
        """See `PromptMethod`; what is known is looked up."""
        del prompt
        return self.network.readers[-1].label_scores(prepared, self.active_prompts()[-1])

    def write_answers(self, prepared: Sequence[Example], prompt: Prompt) -> list[str]:
        """See `PromptMethod`; what a server has written before is looked up."""
        if self.remote is None:
            return super().write_answers(prepared, prompt)
        return self.network.readers[-1].write(prepared, self.active_prompts()[-1], self.max_new_tokens)

    def answer_nll(self, prepared: Sequence[Example], prompt: Prompt) -> Sequence[float | None]:
        """See `PromptMethod`."""
        if self.remote is None:
            return super().answer_nll(prepared, prompt)
        if not self.remote.server.log_probs or any(example.chat for example in prepared):
            return [None] * len(prepared)
        texts = [[str(example.answer)] for example in prepared]
        scores = self.network.readers[-1].log_probs(prepared, [self.active_prompts()[-1]], texts)
        return [-value for value in scores.flatten().tolist()]

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._right = [0.0, 0.0]

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[dict[str, Any]]]:
        """NLL and accuracy of the prompts of now."""
        output = super().validation_step(batch, batch_idx)
        self._right[0] += sum(bool(row["correct"]) for row in output["rows"])
        self._right[1] += len(output["rows"])
        return output

    def on_validation_epoch_end(self) -> None:
        """Keep the prompts if they are strictly better than the best, or go back to those; see `PromptMemory`."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return
        accuracy = self._right[0] / self._right[1]
        self.log("val/best_accuracy", max(accuracy, self.prompt_memory.best_accuracy))
        before = self.prompts
        self.prompts = self.prompt_memory.update(before, accuracy)
        self.validation_rows = [
            {
                "kind": "validation",
                "prompts": before,
                "accuracy": round(accuracy, 5),
                "best_accuracy": round(self.prompt_memory.best_accuracy, 5),
                "back_to_best": self.prompts != before,
            }
        ]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_meta(self) -> dict[str, str | int]:
        """See `PromptMethod`; prompts may be of any length, layers are not."""
        meta = super().checkpoint_meta()
        del meta["length"]
        hidden = [config.name for config in self.layer_lms[:-1]]
        return {
            **meta,
            **({"hidden layers' model": " | ".join(hidden)} if hidden else {}),
            "layers": len(self.layer_settings),
            "templates": repr([layer.template for layer in self.placed]),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the prompts and all that decides how they go on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE] = {
            "initial": list(self.initial_prompts),
            "prompts": list(self.prompts),
            "memory": self.prompt_memory.state(),
            "arms": [arms.state() for arms in self.arms],
            "cache": self.cache.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint[STATE]
        self.initial_prompts, self.prompts = list(state["initial"]), list(state["prompts"])
        self.prompt_memory.load(state["memory"])
        for arms, known in zip(self.arms, state["arms"], strict=True):
            arms.load(known)
        self.cache.load(state["cache"])
