"""Compare the step time of prompt tuning with PEFT, alternating steps in one process.

    python experiments/benchmarks/prompt_tuning.py [--steps 10] [--device cpu] [--only "10 tokens, P = *"]

Both train the same prompt on the same frozen weights with the same batches, the same loss (mean over answer tokens)
and the same optimiser. PEFT repeats the prompt in every row and computes logits at every position. This project runs
the shared prefix once, packs rows without padding, and computes logits only for answer tokens.

The batches are real antonyms (`Here are two hot and` -> ` cold`, which also share their first words), and random tokens
with only the prompt in common: 10 (8 of context, 2 of answer), 256 (128 and 128, 16 rows), and 64 (62 and 2) after a
prompt of 1,000. In the last case, PEFT runs four rows at a time, because 32 do not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.lm.encoding import Row

BATCH = 32
# Rows, tokens of context, tokens of answer, and rows of PEFT per pass.
RANDOM = {"10 tokens": (32, 8, 2, 32), "256 tokens": (16, 128, 128, 16), "64 tokens": (32, 62, 2, 4)}
# Kind, P, and maximum number of timed steps.
SETTINGS = [
    ("antonyms", 20, 10**9),
    ("antonyms", 100, 10**9),
    ("10 tokens", 20, 10**9),
    ("10 tokens", 100, 10**9),
    ("256 tokens", 20, 3),
    ("64 tokens", 1000, 1),
]
NAME = "smollm2-135m-instruct"
Batches = list[list[Row]]


def antonym_batches(lm: FrozenLM, length: int, count: int) -> Batches:
    """Make batches of antonyms with the prompt first."""
    data = Antonyms(template="{prompt}Here are two {question} and {answer}")
    examples = data.examples("train")
    order = random.Random(0).choices(range(len(examples)), k=count * BATCH)
    rows = lm.encode([examples[index] for index in order], length)
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def random_batches(lm: FrozenLM, length: int, count: int, kind: str) -> Batches:
    """Make batches of random tokens."""
    draw = random.Random(0)
    slot = [-1 - p for p in range(length)]
    tokens = range(100, lm.vocabulary)
    rows, context, answer, _ = RANDOM[kind]
    return [
        [Row(slot + draw.choices(tokens, k=context), draw.choices(tokens, k=answer)) for _ in range(rows)]
        for _ in range(count)
    ]


class Ours:
    """Training steps of this project."""

    def __init__(self, lm: FrozenLM, initial: Tensor) -> None:
        """Start from ``initial``."""
        self.lm = lm
        self.prompt = torch.nn.Parameter(initial.clone())
        self.optimizer = torch.optim.AdamW([self.prompt], lr=1e-2, weight_decay=0.0)

    def step(self, rows: list[Row]) -> tuple[float, Tensor]:
        """Loss and gradient; the optimiser has stepped."""
        self.optimizer.zero_grad()
        scores = self.lm.score_rows(rows, self.prompt)
        loss = (scores.nll * scores.tokens).sum() / scores.tokens.sum()
        loss.backward()
        self.optimizer.step()
        return loss.item(), self.prompt.grad.clone()

    def flops(self, rows: list[Row]) -> float:
        """Count the operations of the linear layers, forward and backward with respect to the inputs."""
        before = self.lm.tokens_forwarded
        with torch.no_grad():
            self.lm.score_rows(rows, self.prompt)
        return flops(self.lm, self.lm.tokens_forwarded - before, sum(len(row.answer) for row in rows))


class Peft:
    """Training steps of PEFT's prompt tuning, as in its documentation."""

    def __init__(self, lm: FrozenLM, initial: Tensor, dtype: torch.dtype, most: int) -> None:
        """Start from ``initial``; run at most ``most`` rows per pass."""
        self.lm, self.length, self.most = lm, len(initial), most
        model = AutoModelForCausalLM.from_pretrained(embedded_folder(NAME), dtype=dtype)
        config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.length)
        self.model = get_peft_model(model, config).to(lm.device).eval()
        self.prompt = self.model.prompt_encoder.default.embedding.weight
        with torch.no_grad():
            self.prompt.copy_(initial)
        self.optimizer = torch.optim.AdamW([self.prompt], lr=1e-2, weight_decay=0.0)

    def step(self, rows: list[Row]) -> tuple[float, Tensor]:
        """Loss and gradient; the optimiser has stepped."""
        self.optimizer.zero_grad()
        parts = [rows[start : start + self.most] for start in range(0, len(rows), self.most)]
        loss = sum(self._backward(part, len(part) / len(rows)) for part in parts)
        self.optimizer.step()
        return loss, self.prompt.grad.float().clone()

    def _backward(self, rows: list[Row], share: float) -> float:
        full = [row.context[self.length :] + row.answer for row in rows]
        width = max(map(len, full))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in full], device=self.lm.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full], device=self.lm.device)
        labels = torch.full_like(ids, -100)
        for b, row in enumerate(rows):
            start = len(full[b]) - len(row.answer)
            labels[b, start : len(full[b])] = torch.tensor(row.answer)
        loss = share * self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return loss.item()

    def flops(self, rows: list[Row]) -> float:
        """Count the operations of the linear layers, forward and backward with respect to the inputs."""
        width = max(len(row.context) + len(row.answer) for row in rows)
        return flops(self.lm, len(rows) * width, len(rows) * width)


def flops(lm: FrozenLM, tokens: int, logits: int) -> float:
    """Count two operations per weight and token forward, and two backward, because frozen weights have no gradient."""
    head = lm.vocabulary * lm.width
    layers = sum(module.weight.numel() for module in lm.model.modules() if isinstance(module, torch.nn.Linear)) - head
    return 4.0 * (layers * tokens + head * logits)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure the floating-point operations per second of a large square matrix product, the best of several."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(8))
    return 2 * size**3 / best


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Return the duration in seconds, with the device synchronised before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(lm: FrozenLM, length: int, kind: str, steps: int, dtype: torch.dtype) -> dict[str, Any]:
    """Alternate steps of both on the same batches, and compare the median times."""
    warm = min(steps, 2)
    count = steps + warm
    batches = antonym_batches(lm, length, count) if kind == "antonyms" else random_batches(lm, length, count, kind)
    matrix = lm.embedding_matrix().float()
    initial = matrix[torch.randint(100, lm.vocabulary, (length,), generator=torch.Generator().manual_seed(0))]
    most = RANDOM[kind][3] if kind in RANDOM else BATCH
    ours, peft = Ours(lm, initial), Peft(lm, initial, dtype, most)
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    results: dict[str, list[tuple[float, Tensor]]] = {"ours": [], "peft": []}
    label = f"{kind}, P = {length}, {str(dtype).removeprefix('torch.')}"
    for batch in track(batches, description=label, console=Console(stderr=True)):
        for name, method in (("ours", ours), ("peft", peft)):
            seconds[name].append(timed(lambda m=method, n=name, b=batch: results[n].append(m.step(b)), lm.device))
    our_gradient, peft_gradient = results["ours"][0][1], results["peft"][0][1]
    medians = {name: statistics.median(values[warm:]) for name, values in seconds.items()}
    peak = matmul_peak(dtype, lm.device)
    work = {
        name: statistics.median(m.flops(batch) for batch in batches[warm:])
        for name, m in (("ours", ours), ("peft", peft))
    }
    tokens = statistics.median(sum(len(row.context) + len(row.answer) for row in batch) for batch in batches)
    return {
        "batch": kind,
        "P": length,
        "dtype": str(dtype).removeprefix("torch."),
        "peft_seconds": medians["peft"],
        "our_seconds": medians["ours"],
        "ratio": medians["peft"] / medians["ours"],
        "first_loss_peft": results["peft"][0][0],
        "first_loss_ours": results["ours"][0][0],
        "gradient_difference": float((our_gradient - peft_gradient).norm() / peft_gradient.norm()),
        "tokens_per_second_peft": tokens / medians["peft"],
        "tokens_per_second_ours": tokens / medians["ours"],
        "peak_share_peft": work["peft"] / medians["peft"] / peak,
        "peak_share_ours": work["ours"] / medians["ours"] / peak,
        "matmul_gflops": peak / 1e9,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table for the terminal, and as Markdown for RESULTS.md."""
    table = Table(title="One training step: PEFT against this project")
    heads = (
        "batch",
        "P",
        "dtype",
        "PEFT s",
        "ours s",
        "ratio",
        "loss PEFT / ours",
        "gradients differ by",
        "tokens/s PEFT / ours",
        "share of matmul peak PEFT / ours",
    )
    for head in heads:
        table.add_column(head, justify="right")
    lines = []
    for row in rows:
        cells = (
            row["batch"],
            str(row["P"]),
            row["dtype"],
            f"{row['peft_seconds']:.2f}",
            f"{row['our_seconds']:.3f}",
            f"{row['ratio']:.1f}x",
            f"{row['first_loss_peft']:.4f} / {row['first_loss_ours']:.4f}",
            f"{row['gradient_difference']:.1e}",
            f"{row['tokens_per_second_peft']:.0f} / {row['tokens_per_second_ours']:.0f}",
            f"{row['peak_share_peft']:.0%} / {row['peak_share_ours']:.0%}",
        )
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    Console(width=160).print(table)
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads) + "\n" + "\n".join(lines))


def main() -> None:
    """Run all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps per setting")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="*", help="settings as 'antonyms, P = 20, float32', with wildcards")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/prompt_tuning.json"))
    arguments = parser.parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        lm = FrozenLM.load(LMConfig(NAME, dtype=dtype)).to(arguments.device)
        for kind, length, most in SETTINGS:
            if fnmatch(f"{kind}, P = {length}, {dtype}", arguments.only):
                rows.append(compare(lm, length, kind, min(arguments.steps, most), getattr(torch, dtype)))
    show(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
