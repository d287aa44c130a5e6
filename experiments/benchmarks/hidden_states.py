"""Compare a Refiner's training step with cached hidden states to one that computes them in every step.

    python experiments/benchmarks/hidden_states.py --train gsm8k/train.jsonl

The data are GSM8K questions with final answers. The benchmark first compares losses and gradients. It then alternates
steps of both, and reports the ratio of the median times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from lightning_prompts.datamodules import GSM8K
from lightning_prompts.lm import FrozenLM, LMConfig, StateStore
from lightning_prompts.methods import RefinerTuning
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.refiners.networks import MLPRefiner, RefinerNetwork, TransformerRefiner
from lightning_prompts.types import Example


def step(method: RefinerTuning, store: StateStore, examples: list[Example]) -> tuple[float, torch.Tensor]:
    """Compute the loss and the gradient of one batch."""
    method.zero_grad()
    prompts = method.refiner(*store([example.question for example in examples]))
    loss = method.lm.score(examples, prompts).nll.mean()
    loss.backward()
    gradient = torch.cat([value.grad.flatten() for value in method.trainable_parameters() if value.grad is not None])
    return float(loss.detach()), gradient


def compare(lm: FrozenLM, network: RefinerNetwork, batches: list[list[Example]], folder: Path) -> str:
    """Make one row of the table."""
    method = RefinerTuning(4, network, init=FromText("Answer this question"), cache_states=False)
    method.lm = lm
    method.build_prompt()
    torch.nn.init.normal_(method.refiner.head.linear.weight, std=1e-3)
    kept, fresh = (StateStore(lm, method.query, network.pooled, folder) for _ in range(2))
    start = time.perf_counter()
    path = kept.prepare([example.question for batch in batches for example in batch])
    filling = time.perf_counter() - start
    (one, gradient), (other, again) = (step(method, store, batches[0]) for store in (kept, fresh))
    distance = float((gradient - again).norm() / again.norm())
    seconds: dict[str, list[float]] = {"kept": [], "fresh": []}
    for batch in batches[1:]:
        for name, store in (("kept", kept), ("fresh", fresh)):
            start = time.perf_counter()
            step(method, store, batch)
            seconds[name].append(time.perf_counter() - start)
    fast, slow = (statistics.median(seconds[name]) for name in ("kept", "fresh"))
    return (
        f"| {type(network).__name__} | {str(lm.model.dtype).removeprefix('torch.')} | {1e3 * slow:.0f} ms | "
        f"{1e3 * fast:.0f} ms | {slow / fast:.2f}x | {abs(one - other):.1e} | {distance:.1e} | "
        f"{path.stat().st_size / 1e6:.1f} MB, {filling:.0f} s |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="train.jsonl of GSM8K; default: download it from the hub")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    data = GSM8K(train=options.train, max_train_examples=options.batch_size * (options.repeats + 1))
    examples = data.examples("train")
    batches = [examples[start : start + options.batch_size] for start in range(0, len(examples), options.batch_size)]
    console = Console(soft_wrap=True, highlight=False)
    console.print("| refiner | dtype | states in every step | kept | ratio | loss differs by | gradient | file |")
    console.print("|---|---|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        lm = FrozenLM.load(LMConfig(dtype=dtype))
        for network in (MLPRefiner(), TransformerRefiner()):
            with tempfile.TemporaryDirectory() as folder:
                console.print(compare(lm, network, batches, Path(folder)))


if __name__ == "__main__":
    main()
