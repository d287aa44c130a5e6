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
    """Trains the prompts of stacked LM calls; each training step proposes prompts and takes the best.

    The Trainer counts steps, validates and saves as for any other method; there are no gradients. The result is the
    prompts with the best validation accuracy, including the initial ones.

    Args:
        layers: Layers from the input to the answer; ``None`` for one layer that starts with the task's instruction.
        text: Initial prompt of the top layer, which replaces the one in ``layers``; ``None`` keeps that one.
        proposals: Sources of candidates; ``None`` for 19 prompts by the proposer.
        posterior: How hidden texts are drawn and weighed; ``None`` for the paper's way. Only for two or more layers.
        error_weight: ``lambda``, the initial penalty for the likelihood of hidden texts that led to errors; it decays
            to 0 over the run. Only for two or more layers.
        trust: Weight of the divergence from the current prompt's class probabilities.
        memory: ``M``, number of good prompts to rewrite besides the current ones.
        tolerance: Return to the best prompts after this many validations in a row without a better accuracy; -1 for
            never.
        max_prompt_tokens: Maximum length of a proposal, in tokens; longer ones are dropped.
        proposer: The LM that writes proposals; ``None`` for the method's own.
        memory_mb: Approximate memory of one scoring pass, in megabytes; increase it on a GPU.
        lm: The frozen language model of layers without their own.
        max_new_tokens: Maximum length of a free-text answer, in tokens.
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
        lm: LMConfig = LMConfig(),
        max_new_tokens: int = 16,
    ) -> None:
        """Check the settings; LMs are loaded later."""
        layers = [LanguageLayer(None)] if layers is None else layers
        super().__init__(
            layers,
            text=text,
            memory=memory,
            tolerance=tolerance,
            max_prompt_tokens=max_prompt_tokens,
            proposer=proposer,
            memory_mb=memory_mb,
            lm=lm,
            max_new_tokens=max_new_tokens,
        )
        check_finite("error_weight", error_weight)
        check_finite("trust", trust)
        if len(layers) == 1 and (posterior is not None or error_weight):
            raise UserError(
                f"{'error_weight' if posterior is None else 'posterior'} is about hidden texts, and a network of one "
                "layer has none: give layers another one, or leave it out"
            )
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
        """The answer likelihood for one layer, or its variational bound for more."""
        return "answer likelihood" if len(self.layer_settings) == 1 else "variational bound of the answer likelihood"

    def setup(self, stage: str) -> None:
        """See `TextPromptMethod`.

        Raises:
            UserError: ``trust`` is set, and a training answer is free text.
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

        Only the first hidden layer can work without log-probabilities: if it does not learn, and the prior does not
        count in the weights of the draws.
        """
        weighed = len(self.layer_settings) > 1 and self.settings.posterior.sharpening.prior
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
