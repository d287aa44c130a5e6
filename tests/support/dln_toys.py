"""Toys for the tests of Deep Language Networks, and plain references without cache, batching or sharing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prompts.callbacks import PromptTable, ResultFiles, ValidateAtEnd
from lightning_prompts.datamodules.base import SourceRow, TextDataModule
from lightning_prompts.dln.cached_lm import CachedLM, CheckpointedCache
from lightning_prompts.dln.layer import LanguageLayer, PlacedLayer
from lightning_prompts.dln.messages import ThompsonSampling
from lightning_prompts.dln.network import LanguageNetwork
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.dln.proposals import LanguageModelProposals, Proposal, Proposals, Request, RuleRewrites
from lightning_prompts.dln.step import Stepper, StepSettings
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.methods import DeepLanguageNetwork
from lightning_prompts.template import Template
from lightning_prompts.types import Example
from support.models import TINY
from support.references import plain_classes, plain_sum

YES_NO = (("yes", "correct"), ("no",))
FORWARD = Template("{prompt}\n\n{question}\n\nAnswer: {answer}\n")
ROWS = [("Is it?", "yes"), ("Was it so?", "no"), ("Who?", "no"), ("And is it true?", "yes")]


def examples(labels: bool = True) -> list[Example]:
    return [
        FORWARD.render({"question": question, "answer": answer}, f"row {n}", labels=YES_NO if labels else ())
        for n, (question, answer) in enumerate(ROWS)
    ]


@dataclass(frozen=True)
class Given(Proposals):
    """The same texts every time."""

    texts: tuple[str, ...]

    def propose(self, request: Request) -> list[Proposal]:
        return [Proposal(text, request.parents[0], "Given") for text in self.texts]


def cached_of(lm: FrozenLM, cache: CheckpointedCache | None = None, **settings: bool) -> CachedLM:
    return CachedLM(lm, lm.name, cache or CheckpointedCache(), 256.0, **settings)


def stepper_of(
    lm: FrozenLM,
    layers: Sequence[LanguageLayer],
    texts: Sequence[str] = ("Go.", "Say yes."),
    trust: float = 0.0,
    posterior: Posterior = Posterior(samples=3),
) -> Stepper:
    cached = cached_of(lm)
    placed = [PlacedLayer(layer, index, len(layers)) for index, layer in enumerate(layers)]
    settings = StepSettings([Given(tuple(texts))], posterior, trust=trust)
    return Stepper(LanguageNetwork(placed, [cached] * len(layers), 4), cached, settings)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slot(lm: FrozenLM, example: Example, prompt: str) -> tuple[list[int], torch.Tensor]:
    """One example's context around a prompt, and the prompt's vectors."""
    ids = lm.encoder.tokens(prompt)
    row = lm.encoder.row(replace(example, answer=None), len(ids))
    return row.context, lm.embed(torch.tensor(ids, dtype=torch.long))


def plain_mean(lm: FrozenLM, example: Example, prompt: str, text: str) -> float:
    """Mean token log-probability of a text after a placed example."""
    tokens = lm.encoder.tokens(text)
    context, vectors = slot(lm, example, prompt)
    return plain_sum(lm, context, tokens, vectors) / len(tokens) if tokens else 0.0


def plain_answer(lm: FrozenLM, example: Example, prompt: str) -> float:
    """Log-probability of the reference: of its class, or per token."""
    if example.labels:
        return float(plain_classes(lm, example, slot(lm, example, prompt)[1])[example.label])
    return plain_mean(lm, example, prompt, str(example.answer))


class Toy(TextDataModule):
    """A few labelled questions."""

    def __init__(self, labels: bool = True, template: str = FORWARD.text, size: int = 12, **settings: Any) -> None:
        super().__init__(template=template, batch_size=4, eval_batch_size=8, **settings)
        self.labels, self.size = labels, size

    def load_rows(self) -> dict[str, list[SourceRow]]:
        rows = [
            SourceRow(
                {"question": f"Is {n} {'odd' if n % 3 else 'even'}?", "answer": ("yes", "no")[n % 2]},
                f"row {n}",
                labels=YES_NO if self.labels else (),
            )
            for n in range(3 * self.size)
        ]
        return {split: rows[k::3] for k, split in enumerate(("train", "val", "test"))}


PROPOSALS: list[Proposals] = [
    LanguageModelProposals(3, max_new_tokens=8, shown=1, messages=ThompsonSampling()),
    RuleRewrites(3),
]


def network(**settings: object) -> DeepLanguageNetwork:
    values: dict[str, object] = {
        "layers": [LanguageLayer(prompt="Think.", max_new_tokens=5), LanguageLayer(prompt="Say.")],
        "proposals": PROPOSALS,
        "posterior": Posterior(samples=2),
        "error_weight": 0.5,
        "max_prompt_tokens": 60,
        "lm": LMConfig(f"{TINY},max_position_embeddings=700"),
        **settings,
    }
    return DeepLanguageNetwork(**values)  # type: ignore[arg-type]


def trainer(folder: Path, steps: int, validate: int = 2, **settings: Any) -> L.Trainer:
    saved = ModelCheckpoint(folder / "saved", "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    return L.Trainer(
        max_epochs=-1,
        max_steps=steps,
        val_check_interval=validate,
        check_val_every_n_epoch=None,
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saved, PromptTable(), ResultFiles(), ValidateAtEnd()],
        accelerator="cpu",
        log_every_n_steps=1,
        **settings,
    )
