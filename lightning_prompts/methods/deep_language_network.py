"""Deep Language Networks (Sordoni et al. 2023, arXiv 2306.12509): learn the prompts of stacked LM calls.

Prompt: text, one for each layer. Estimator: proposals by an LM. Objective: answer likelihood, as a variational bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.dln.proposals import LanguageModelProposals, Proposals
from lightning_prompts.dln.step import Stepper, StepResult, StepSettings
from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.types import Example


class DeepLanguageNetwork(TextPromptMethod):
    """Layers are calls of an LM, each with a prompt; a training step proposes prompts and takes the best.

    The Trainer counts steps, validates and saves as for any other method; there are no gradients. The result are the
    prompts with the best validation accuracy, the initial ones included.

    Args:
        layers: From the layer that reads the input to the one that answers; ``None`` for one without a prompt.
        text: The top layer's initial prompt, in place of the one in ``layers``; ``None`` for that one.
        proposals: Sources of candidates; ``None`` for 19 prompts by the proposer.
        posterior: How hidden texts are drawn and weighed; ``None`` for the paper's. Only for two layers or more.
        error_weight: ``lambda``, the initial penalty for the likelihood of hidden texts that led to errors; it falls to
            0 over the run. Only for two layers or more.
        trust: Weight of the divergence from the current prompt's class probabilities.
        memory: ``M``, number of good prompts that are rewritten beside the current ones.
        tolerance: After this many validations in a row without a better accuracy, return to the best prompts; -1 for
            never.
        max_prompt_tokens: Longer proposals are dropped.
        proposer: The LM that writes proposals; ``None`` for the method's own.
        memory_mb: Megabytes that one scoring pass may take, about; on a GPU give it more.
        lm: The frozen language model of the layers that name none.
        max_new_tokens: Limit of an answer in free text.
    """

    estimator_name = "proposals by an LM"

    def __init__(
        self,
        layers: list[LanguageLayer] | None = None,
        text: str | None = None,
        proposals: list[Proposals] | None = None,
        posterior: Posterior | None = None,
        error_weight: float = 0.0,
        trust: float = 0.0,
        memory: int = 2,
        tolerance: int = 2,
        max_prompt_tokens: int = 200,
        proposer: LMConfig | None = None,
        memory_mb: float = 256.0,
        lm: LMConfig = LMConfig(),  # noqa: B008
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; nothing is loaded yet."""
        layers = [LanguageLayer()] if layers is None else layers
        super().__init__(layers, text, memory, tolerance, max_prompt_tokens, proposer, memory_mb, lm, max_new_tokens)
        check_finite("error_weight", error_weight)
        check_finite("trust", trust)
        if len(layers) == 1 and (posterior is not None or error_weight):
            raise UserError(
                f"{'error_weight' if posterior is None else 'posterior'} is about hidden texts, and a network of one "
                "layer has none: give layers another one, or leave it out"
            )
        if not any(layer.learn for layer in layers):
            raise UserError("no layer learns; set learn: true for one of layers, or test FixedPrompt or ChainOfThought")
        if proposals is not None and not proposals:
            raise UserError("proposals is empty; give LanguageModelProposals, MinedExamples or RuleRewrites")
        self.error_weight = error_weight
        self.settings = StepSettings(
            proposals=[LanguageModelProposals()] if proposals is None else proposals,
            posterior=Posterior() if posterior is None else posterior,
            trust=trust,
            max_prompt_tokens=max_prompt_tokens,
        )

    @property
    def objective_name(self) -> str:
        """The likelihood, or its bound with hidden texts."""
        return "answer likelihood" if len(self.layer_settings) == 1 else "variational bound of the answer likelihood"

    def setup(self, stage: str) -> None:
        """See `TextPromptMethod`.

        Raises:
            UserError: ``trust`` is set, and an answer to learn from is free text.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.settings.trust and data is not None:
            free = next((example for example in data.examples("train") if not example.labels), None)
            if free is not None:
                raise UserError(
                    f"{free.source or 'example'}: trust compares class probabilities, and this answer is free text; "
                    "set trust to 0"
                )

    def check_servers(self) -> None:
        """See `TextPromptMethod`.

        Only the first hidden layer can do without log-probabilities, if it does not learn and the prior of its draws
        does not weigh them.
        """
        weighed = len(self.layer_settings) > 1 and self.settings.posterior.sharpening.uses_prior
        for index, (layer, cached) in enumerate(zip(self.layer_settings, self.network.lms, strict=True)):
            if index or layer.learn or weighed:
                cached.lm.check_scores([])
        super().check_servers()

    def improve(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Run one variational step."""
        generator = self.step_generator()
        weight = self.error_weight * (1 - self.progress(self.trainer.global_step))
        stepper = Stepper(self.network, self.proposer, self.settings)
        result = stepper.step(examples, self.prompts, self.prompt_memory, self.message_stats, weight, generator)
        self.prompts = result.prompts
        self._log_step(result, len(examples))
        return result.rows()

    def _log_step(self, result: StepResult, count: int) -> None:
        self.log("train/accuracy", result.accuracy, batch_size=count)
        for layer, (before, after) in result.rewards.items():
            self.log(f"train/reward_{layer}", before, batch_size=count)
            self.log(f"train/gain_{layer}", after - before, batch_size=count, prog_bar=True)
        for layer in result.empty:
            self.keeps_prompt(layer)
