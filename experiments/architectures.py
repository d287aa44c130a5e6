"""Every model type that transformers has as a causal LM, with random weights: right, refused, or an error.

    python experiments/architectures.py [TYPE ...]
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_prompts.lm.probe import difference, twin_config


def main(names: list[str]) -> None:
    """Print one line for each type, and how many there are of each kind."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for name in names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.perf_counter()
        try:
            found = difference(twin_config(AutoConfig.for_model(name)))
            kind = "refused" if found else "right"
        except Exception as error:  # what nobody should ever see
            kind, found = "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        counts[kind] += 1
        print(f"{name:28} {kind:8} {time.perf_counter() - started:5.2f} s  {found}", flush=True)
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
