"""Compare memory plans with measured peaks, each in a separate process.

python experiments/benchmarks/memory_plan.py            # the 135M model, three methods, two batch sizes
python experiments/benchmarks/memory_plan.py --device cuda --dtype bfloat16

On a CPU, the peak is the largest increase of the resident memory since before the model was loaded, sampled every
millisecond, with an allocator that returns freed memory immediately. On a GPU, it is
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.config import Dtype
from lightning_prompts.memory_plan import batches_of, make_plan
from lightning_prompts.methods import LoraTuning, PrefixTuning, PromptMethod, SoftPromptTuning
from lightning_prompts.types import Batch, Example

METHODS: dict[str, Callable[[LMConfig], PromptMethod]] = {
    "soft": lambda lm: SoftPromptTuning(20, lm=lm),
    "prefix": lambda lm: PrefixTuning(20, lm=lm),
    "lora": lambda lm: LoraTuning(8, text=" antonyms", lm=lm),
}
PAGE = os.sysconf("SC_PAGE_SIZE")
# Return freed memory to the system, so that resident memory equals used memory.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak:
    """Measures the peak memory relative to its start."""

    def __init__(self, device: str) -> None:
        """Start measuring."""
        self.device = device
        self.start = self.highest = torch.cuda.memory_allocated() if device == "cuda" else resident()
        self.over = threading.Event()
        if device != "cuda":
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def _watch(self) -> None:
        while not self.over.is_set():
            self.highest = max(self.highest, resident())
            time.sleep(0.001)

    def stop(self) -> int:
        """Stop measuring, and return the peak in bytes."""
        self.over.set()
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.start
        self.thread.join()
        return self.highest - self.start


def measure(name: str, batch_size: int, dtype: Dtype, device: str, checkpointing: bool) -> dict[str, float]:
    """Compute the plan and measure the peak of loading and a few training steps."""
    torch.manual_seed(0)
    data = Antonyms(batch_size=batch_size, eval_batch_size=batch_size, max_train_examples=3 * batch_size)
    method = METHODS[name](LMConfig(dtype=dtype, gradient_checkpointing=checkpointing))
    batches = batches_of(data, "train")
    plan = make_plan(method, batches, batches)
    warm(device)
    peak = Peak(device)
    method.configure_model()
    method.to(device)
    assert method.optimizer is not None
    optimizer = method.optimizer(method.trainable_parameters())
    for batch in batches:
        step(method, optimizer, batch)
    highest = peak.stop()
    return {"planned": plan.total("training"), "peak": highest, "weights": plan.of("LM weights")}


def step(method: PromptMethod, optimizer: torch.optim.Optimizer, examples: list[Example]) -> None:
    """Run one training step."""
    optimizer.zero_grad()
    loss = method.training_step(Batch(examples), 0)
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def warm(device: str) -> None:
    """Run a step of a tiny model, for the one-time setup of libraries, which is not part of the plan."""
    data = Antonyms(batch_size=4, max_train_examples=4)
    shape = "hidden_size=32,intermediate_size=48,num_hidden_layers=1,num_attention_heads=4,num_key_value_heads=2"
    method = LoraTuning(2, text="is", lm=LMConfig(f"random:llama,{shape}"))
    method.configure_model()
    method.to(device)
    assert method.optimizer is not None
    step(method, method.optimizer(method.trainable_parameters()), batches_of(data, "train")[0])


def main() -> None:
    """Print a table with one row per method and batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SIZE"), help="measure in this process, print JSON")
    options = parser.parse_args()
    if options.one:
        name, size = options.one
        print(json.dumps(measure(name, int(size), options.dtype, options.device, options.gradient_checkpointing)))
        return
    table = Table("method", "batch", "planned", "measured", "planned / measured", "above the weights", title="MB")
    extra = ["--dtype", options.dtype, "--device", options.device]
    extra += ["--gradient-checkpointing"] * options.gradient_checkpointing
    for name in options.methods:
        for size in options.batch_sizes:
            words = [sys.executable, __file__, "--one", name, str(size), *extra]
            done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            planned, peak, weights = (found[key] / 1e6 for key in ("planned", "peak", "weights"))
            rest = f"{planned - weights:.0f} / {peak - weights:.0f} = {(planned - weights) / (peak - weights):.2f}"
            table.add_row(name, str(size), f"{planned:.0f}", f"{peak:.0f}", f"{planned / peak:.2f}", rest)
    Console().print(table)


if __name__ == "__main__":
    main()
