"""One small run of every method: what the tests train on two devices, and what the benchmark counts waits of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_prompts.datamodules.base import SourceRow, TextDataModule
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.dln.proposals import (
    Crossover,
    InducedInstructions,
    LanguageModelProposals,
    Paraphrases,
    Reflection,
    RuleRewrites,
)
from lightning_prompts.estimators.baselines import LeaveOneOut, MovingAverage, NoBaseline, SelfCritical, ValueHead
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.estimators.relaxations import GumbelSoftmax, Projected, Softmax, StraightThrough
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import (
    Ape,
    Capo,
    ChainOfThought,
    DeepLanguageNetwork,
    DemonstrationSearch,
    FewShot,
    FixedPrompt,
    Gepa,
    HardPromptSearch,
    LatentSeek,
    LoraTuning,
    PrefixTuning,
    PromptDistillation,
    PromptMethod,
    RefinerTuning,
    ReinforceRefiner,
    RelaxedPromptTuning,
    ScratchTransformer,
    SoftPromptTuning,
)
from lightning_prompts.methods.self_study import SelfStudy
from lightning_prompts.objectives import BertScoreLoss, Divergence, Likelihood, WeightedSum
from lightning_prompts.objectives.rewards import AnswerLikelihood, BertScore, ExactMatch, Mixture, TokenF1
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.prefix import PrefixMLP
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.refiners.heads import Factored, Full
from lightning_prompts.refiners.networks import MLPRefiner, TransformerRefiner
from lightning_prompts.search.demonstrations import AddedDemonstrations, ChangedDemonstrations, RandomDemonstrations
from lightning_prompts.search.rounding import Rounding
from lightning_prompts.search.scoring import Racing

CALM_MODEL = (
    "random:llama,hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2,"
    "max_position_embeddings=700"
)
# Wide weights, so that what a tiny random model answers depends on what it reads. In half precision, rounding would
# decide whether gradients overflow.
MODEL = f"{CALM_MODEL},initializer_range=0.2"
OTHER_MODEL = f"{MODEL},num_key_value_heads=1"
TEMPLATE = "{prompt} {question} -> {answer}\n"
INFILL = "{question} is{prompt} {answer}\n"
LABELLED = "{prompt}\n\n{question}\n\nAnswer: {answer}\n"
YES_NO = (("yes", "correct"), ("no",))
ANSWERS = ("up", "left of it", "no")


class Questions(TextDataModule):
    """A few questions of different lengths, with answers in free text or of two classes."""

    task_instruction = "Say where."

    def __init__(self, template: str = TEMPLATE, labels: bool = False) -> None:
        super().__init__(template=template, batch_size=4, eval_batch_size=4)
        self.labels = labels

    def load_rows(self) -> dict[str, list[SourceRow]]:
        answers = [names[0] for names in YES_NO] if self.labels else ANSWERS
        rows = [
            SourceRow(
                {"question": f"{'the ' * (n % 4)}{n}", "answer": answers[n % len(answers)]},
                f"row {n}",
                labels=YES_NO if self.labels else (),
            )
            for n in range(20)
        ]
        return {"train": rows[:12], "val": rows[12:16], "test": rows[16:]}


@dataclass(frozen=True)
class Case:
    """How to build a method.

    Attributes:
        method: Its class.
        settings: Its arguments beside the LM.
        template: The task's.
        labels: Whether the task's answers are classes.
    """

    method: Callable[..., PromptMethod]
    settings: dict[str, Any]
    template: str = TEMPLATE
    labels: bool = False

    def make(self, dtype: str = "float32", model: str = MODEL) -> PromptMethod:
        """The method, without weights yet."""
        lm = replace(self.settings.get("lm", LMConfig()), name=model, dtype=dtype)
        return self.method(**{"max_new_tokens": 2, **self.settings, "lm": lm})

    def data(self) -> Questions:
        """Its task."""
        return Questions(self.template, self.labels)


def _soft(template: str = TEMPLATE, **settings: Any) -> Case:
    return Case(SoftPromptTuning, {"length": 3, **settings}, template)


def _distillation(**settings: Any) -> Case:
    return Case(PromptDistillation, {"length": 3, **settings})


def _relaxed(**settings: Any) -> Case:
    return Case(RelaxedPromptTuning, {"length": 3, **settings})


def _search(**settings: Any) -> Case:
    return Case(HardPromptSearch, {"init": FromText(" ab"), "candidates": 6, "top_k": 30, **settings})


def _refiner(**settings: Any) -> Case:
    return Case(RefinerTuning, {"length": 2, "refiner": MLPRefiner(8), **settings})


def _reinforce(**settings: Any) -> Case:
    return Case(ReinforceRefiner, {"length": 2, "samples": 3, "support": TopK(20), "readable": True, **settings})


def _text(method: Callable[..., PromptMethod], **settings: Any) -> Case:
    return Case(method, {"max_prompt_tokens": 60, **settings}, LABELLED, labels=True)


_TRANSFORMER = TransformerRefiner(8, 1, 2)
_REWARD = Mixture([ExactMatch(), TokenF1(), AnswerLikelihood()], [1, 1, 2])
_HIDDEN, _TOP = LanguageLayer("Think.", max_new_tokens=3), LanguageLayer("Say.")
_NETWORK: dict[str, Any] = {"proposals": [LanguageModelProposals(2, max_new_tokens=4, shown=1), RuleRewrites(1)]}
_TWO_LAYERS: dict[str, Any] = {**_NETWORK, "posterior": Posterior(samples=2), "error_weight": 0.5}

TRAINED: dict[str, Case] = {
    "soft": _soft(),
    "soft, reparametrised": _soft(reparametrization=ResidualMLP(8), objective=Likelihood("tokens")),
    "soft, infill": _soft(INFILL),
    "soft, gradient checkpointing": _soft(lm=LMConfig(MODEL, gradient_checkpointing=True)),
    "latent seek": Case(LatentSeek, {"length": 3, "steps": 2, "samples": 2}),
    "latent seek, classes": Case(LatentSeek, {"length": 3, "steps": 2}, LABELLED, labels=True),
    "prefix": Case(PrefixTuning, {"length": 3, "mlp": None}),
    "prefix, mlp": Case(PrefixTuning, {"length": 3, "mlp": PrefixMLP(4, 5)}),
    "distillation": _distillation(shots=2, text=" two"),
    "distillation, prefix": _distillation(
        student="prefix", shots=2, freeze_first=True, objective=Divergence("reverse", 5, "tokens")
    ),
    "distillation, self-study": _distillation(
        context="Up the hill.", self_study=SelfStudy(size=9, instruction="Ask:", max_question_tokens=4)
    ),
    "relaxed, softmax": _relaxed(estimator=Softmax()),
    "relaxed, gumbel": _relaxed(estimator=GumbelSoftmax()),
    "relaxed, straight-through": _relaxed(estimator=StraightThrough()),
    "relaxed, projected": _relaxed(estimator=Projected(), readable=True),
    "relaxed, rounded": _relaxed(rounding=Rounding(2, 4, 5), readable=True, memory_mb=10),
    "search": _search(),
    "search, everything": _search(n_replace=2, buffer=3, fluency=0.5, readable=True, racing=Racing(2, 0.4)),
    "refiner, mlp, soft": _refiner(),
    "refiner, mlp, straight-through": _refiner(estimator=StraightThrough(), head=Factored(4)),
    "refiner, mlp, gumbel": _refiner(estimator=GumbelSoftmax(), head=Full()),
    "refiner, transformer, soft": _refiner(refiner=_TRANSFORMER),
    "refiner, transformer, straight-through": _refiner(refiner=_TRANSFORMER, estimator=StraightThrough()),
    "refiner, transformer, gumbel": _refiner(refiner=_TRANSFORMER, estimator=GumbelSoftmax()),
    "refiner, states not kept": _refiner(refiner=_TRANSFORMER, cache_states=False),
    "refiner, bertscore": _refiner(objective=WeightedSum([Likelihood(), BertScoreLoss(layer=1)], [1.0, 0.5])),
    "refiner, bertscore of another": _refiner(objective=BertScoreLoss(OTHER_MODEL, -1), estimator=StraightThrough()),
    "reinforce, no baseline": _reinforce(baseline=NoBaseline()),
    "reinforce, moving average": _reinforce(baseline=MovingAverage(), reward=_REWARD, entropy_weight=0.1),
    "reinforce, self-critical": _reinforce(baseline=SelfCritical(), whitened=True),
    "reinforce, leave-one-out": _reinforce(baseline=LeaveOneOut(), pass_rows=5),
    "reinforce, value head": _reinforce(baseline=ValueHead(8)),
    "reinforce, mlp": _reinforce(refiner=MLPRefiner(8), baseline=ValueHead(8), reward=_REWARD),
    "reinforce, transformer": _reinforce(refiner=_TRANSFORMER, baseline=MovingAverage(), cache_states=False),
    "reinforce, bertscore": _reinforce(reward=BertScore(layer=2), samples=2),
    "scratch": Case(ScratchTransformer, {"layers": 1, "width": 16, "heads": 2}),
    "lora": Case(LoraTuning, {"rank": 2, "text": " two"}),
    "network, one layer": _text(DeepLanguageNetwork, layers=[_TOP], **_NETWORK),
    "network, two layers": _text(DeepLanguageNetwork, layers=[_HIDDEN, _TOP], **_TWO_LAYERS),
    "network, two models": _text(
        DeepLanguageNetwork,
        layers=[LanguageLayer("Think.", max_new_tokens=3, lm=LMConfig(OTHER_MODEL)), _TOP],
        proposer=LMConfig(OTHER_MODEL),
        **_TWO_LAYERS,
    ),
    "ape": _text(
        Ape, text="Say.", induced=InducedInstructions(3, max_new_tokens=6), paraphrases=Paraphrases(2, 0.7, 6)
    ),
    "gepa": _text(Gepa, text="Say.", reflection=Reflection(2, 1.0, 6), reward=AnswerLikelihood()),
    "gepa, two layers": _text(Gepa, layers=[_HIDDEN, _TOP], reflection=Reflection(2, 1.0, 6)),
    "capo": _text(
        Capo,
        text="Say.",
        induced=InducedInstructions(2, 1, 1.0, 6),
        crossover=Crossover(2, 1.0, 6),
        mutation=Paraphrases(2, 1.0, 6),
        population=2,
        shots=2,
        racing=Racing(2, 0.4),
        max_prompt_tokens=200,
    ),
    "demonstrations": _text(
        DemonstrationSearch,
        text="Say.",
        sources=[RandomDemonstrations(3, 2), ChangedDemonstrations(2, 2)],
        instructions=[RuleRewrites(1)],
        racing=Racing(2, 0.4),
    ),
    "demonstrations, greedy, free text": Case(
        DemonstrationSearch, {"text": "Say.", "sources": [AddedDemonstrations(3, 2)], "racing": None}
    ),
}
UNTRAINED: dict[str, Case] = {
    "fixed": Case(FixedPrompt, {"text": " two"}),
    "few-shot": Case(FewShot, {"shots": 2, "text": " two"}),
    "chain of thought": Case(ChainOfThought, {"text": None, "reasoning_tokens": 5}, LABELLED, labels=True),
}
