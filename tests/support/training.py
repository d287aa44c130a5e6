"""Short trainings on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prompts.callbacks import PromptReadout, SampleGenerations, Throughput
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.estimators.relaxations import GumbelSoftmax, Projected, Softmax, StraightThrough
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import (
    HardPromptSearch,
    LoraTuning,
    PrefixTuning,
    PromptMethod,
    RelaxedPromptTuning,
    ScratchTransformer,
)
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.prefix import PrefixMLP
from lightning_prompts.search.rounding import Rounding
from lightning_prompts.search.scoring import Racing
from support.models import SMALLEST

LM = LMConfig(SMALLEST)


def data() -> Antonyms:
    return Antonyms(batch_size=4, max_train_examples=20, val_fraction=0.01, test_fraction=0.01)


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 2, "log_every_n_steps": 1, "enable_checkpointing": False, **settings},
    )


def resumable(folder: Path, **settings: Any) -> L.Trainer:
    saves = ModelCheckpoint(folder / "checkpoints", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    return trainer(
        folder,
        callbacks=[saves, PromptReadout(5), SampleGenerations(2), Throughput()],
        enable_checkpointing=True,
        max_epochs=2,
        **{"max_steps": -1, **settings},
    )


MAKE: dict[str, Callable[[], PromptMethod]] = {
    "prefix": lambda: PrefixTuning(3, mlp=None, lm=LM, max_new_tokens=2),
    "prefix, mlp": lambda: PrefixTuning(3, mlp=PrefixMLP(4, 5), lm=LM, max_new_tokens=2),
    "softmax": lambda: RelaxedPromptTuning(3, Softmax(), lm=LM, max_new_tokens=2),
    "gumbel": lambda: RelaxedPromptTuning(3, GumbelSoftmax(), lm=LM, max_new_tokens=2),
    "straight-through": lambda: RelaxedPromptTuning(3, StraightThrough(), lm=LM, max_new_tokens=2),
    "pez": lambda: RelaxedPromptTuning(3, Projected(), lm=LM, max_new_tokens=2),
    "rounded": lambda: RelaxedPromptTuning(
        3, Softmax(), rounding=Rounding(1, 4, 5), lm=LM, max_new_tokens=2, memory_mb=10
    ),
    "search": lambda: HardPromptSearch(init=FromText(" ab"), candidates=6, top_k=30, lm=LM, max_new_tokens=2),
    "search, all": lambda: HardPromptSearch(
        init=FromText(" ab"),
        candidates=6,
        top_k=30,
        n_replace=2,
        buffer=3,
        fluency=0.5,
        readable=True,
        racing=Racing(2, 0.4),
        lm=LM,
        max_new_tokens=2,
    ),
    "lora": lambda: LoraTuning(rank=2, lm=LM, max_new_tokens=2),
    "scratch": lambda: ScratchTransformer(2, 16, 2, max_new_tokens=2),
}
