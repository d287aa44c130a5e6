"""Compare the baselines of REINFORCE: variance of the gradient, reward and cost.

    python experiments/benchmarks/reinforce_baselines.py --seeds 0 1 2
    python experiments/benchmarks/reinforce_baselines.py --seeds 0 1 2 --mixture --baselines LeaveOneOut

The task is one prompt of two tokens for antonyms ("Here are two{prompt} hot and" -> " cold"), or one prompt for each
question of a mixture of five tasks. The reward is the likelihood of the answer. The variance is measured before
training, with the same policy for all baselines: the trace of the covariance of the gradient of one batch over repeated
samples, relative to the first baseline of the table. Baselines that learn are first trained on ten batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_prompts.cli.terminal import quiet
from lightning_prompts.datamodules import Addition, Antonyms, Mixture, TextDataModule, WordPairs
from lightning_prompts.estimators.baselines import (
    Baseline,
    LeaveOneOut,
    MovingAverage,
    NoBaseline,
    SelfCritical,
    ValueHead,
)
from lightning_prompts.estimators.reinforce import log_probability, sample, surrogate_loss
from lightning_prompts.lm import LMConfig
from lightning_prompts.methods import ReinforceRefiner
from lightning_prompts.refiners.networks import MLPRefiner, masked_mean

BASELINES = {kind.__name__: kind for kind in (NoBaseline, MovingAverage, SelfCritical, LeaveOneOut, ValueHead)}
WARM_UP = 10


class Rewards(L.Callback):
    """Collects the mean reward of each step."""

    def __init__(self) -> None:
        """Start without rewards."""
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Add the reward of the step."""
        self.values.append(float(trainer.callback_metrics["train/reward"]))


def task(mixture: bool, seed: int) -> TextDataModule:
    """Make the antonyms task, or a mixture of five tasks that can be told from the question."""
    if not mixture:
        return Antonyms(batch_size=16, seed=seed)
    datasets: dict[str, TextDataModule] = {
        "past_tense": WordPairs(task="past_tense"),
        "plural": WordPairs(task="plural"),
        "capital": WordPairs(task="capital"),
        "antonym": Antonyms(parts=["adj"], min_count=5, max_train_examples=250),
        "addition": Addition(max_digits=2, ood_digits=[], train_size=250, val_size=50, test_size=100),
    }
    return Mixture(datasets, batch_size=16, seed=seed)


def build(baseline: Baseline, mixture: bool, dtype: str) -> ReinforceRefiner:
    """Make the method; its policy starts at the LM's next-token distribution."""
    return ReinforceRefiner(
        length=2,
        samples=8,
        baseline=baseline,
        refiner=MLPRefiner() if mixture else None,
        start="Answer this question" if mixture else "Here are two",
        lm=LMConfig(dtype=dtype),  # type: ignore[arg-type]
        cache_states=False,
    )


def noise(method: ReinforceRefiner, data: TextDataModule, draws: int) -> tuple[float, Tensor]:
    """Return the trace of the gradient's covariance at the initial policy, and the mean gradient."""
    examples = data.examples("train")
    generator = torch.Generator().manual_seed(0)
    batches = [
        [examples[index] for index in torch.randint(len(examples), (16,), generator=generator).tolist()]
        for _ in range(WARM_UP + 1)
    ]
    learning = list(method.baseline.parameters())
    optimizer = torch.optim.Adam(learning, lr=1e-3) if learning else None
    gradients = []
    for number, batch in enumerate([*batches[:WARM_UP], *[batches[-1]] * draws]):
        states, mask = method.states(batch)
        scores = method.refiner(states, mask)
        prompts = sample(scores.detach(), method.samples, generator)
        rewards = method.rewards(batch, prompts)
        greedy = None
        if method.baseline_kind.needs_greedy:
            greedy = method.rewards(batch, scores.detach().argmax(-1)[:, None])[:, 0]
        pooled = masked_mean(states, mask)
        if number >= WARM_UP:
            advantages = rewards - method.baseline(rewards, greedy, pooled)
            leaf = scores.detach().requires_grad_(True)
            surrogate_loss(log_probability(leaf, prompts), advantages).backward()
            gradients.append(leaf.grad.sum(0).flatten())
            continue
        method.baseline.update(rewards)
        if optimizer is not None and (loss := method.baseline.loss(rewards, pooled)) is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    stacked = torch.stack(gradients)
    return float(stacked.var(0).sum()), stacked.mean(0)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure the variance, then train."""
    data = task(options.mixture, seed)
    L.seed_everything(seed)
    method = build(BASELINES[name](), options.mixture, options.dtype)
    method.configure_model()
    variance, mean = noise(method, data, options.draws)
    L.seed_everything(seed)
    method = build(BASELINES[name](), options.mixture, options.dtype)
    rewards = Rewards()
    trainer = L.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[rewards],
        gradient_clip_val=1.0,
    )
    trainer.fit(method, datamodule=data)
    tenth = max(1, options.steps // 10)
    tokens = method.lm.tokens_forwarded
    result = trainer.validate(method, datamodule=data, verbose=False) if options.mixture else None
    return {
        "variance": variance,
        "signal": float(mean.square().sum()),
        "first": statistics.fmean(rewards.values[:tenth]),
        "last": statistics.fmean(rewards.values[-tenth:]),
        "tokens": tokens,
        **({"val_nll": result[0]["val/nll"]} if result else {}),
    }


def mean_and_deviation(values: Sequence[float], digits: int = 4) -> str:
    """Format mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Print a table, and write the results to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--baselines", nargs="+", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--mixture", action="store_true", help="five tasks, a prompt for each question")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--draws", type=int, default=30, help="gradients for the variance")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/reinforce_baselines.json"))
    options = parser.parse_args()
    quiet()
    found: dict[str, list[dict[str, float]]] = {}
    for name in options.baselines:
        found[name] = [run(name, seed, options) for seed in options.seeds]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2))
    console = Console(soft_wrap=True, highlight=False)
    console.print("| baseline | gradient variance | reward, first tenth | last tenth | rises | tokens forwarded |")
    console.print("|---|---|---|---|---|---|")
    first = statistics.fmean(row["variance"] for row in found[options.baselines[0]])
    for name, rows in found.items():
        rises = sum(row["last"] > row["first"] for row in rows)
        console.print(
            f"| {name} | {statistics.fmean(row['variance'] for row in rows) / first:.3f} | "
            f"{mean_and_deviation([row['first'] for row in rows])} | "
            f"{mean_and_deviation([row['last'] for row in rows])} | "
            f"{rises} of {len(rows)} | {statistics.fmean(row['tokens'] for row in rows):,.0f} |"
        )


if __name__ == "__main__":
    main()
