"""Probe all causal-LM architectures of transformers with random weights: supported, refused, or an error.

python experiments/architectures.py [TYPE ...]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_prompts.errors import UserError
from lightning_prompts.lm.probe import probe

# Settings that the default config of a type lacks or gets wrong.
SETTINGS: dict[str, dict[str, Any]] = {
    "nemotron": {"num_key_value_heads": 8},
    "ministral": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}


def main(names: list[str]) -> None:
    """Print one line per model type, and the number of types with each result."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for name in names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        started = time.perf_counter()
        try:
            config = AutoConfig.for_model(name, **SETTINGS.get(name, {}))
            if getattr(config, "sliding_window", 0) is None:  # the architecture supports a window, but it is off
                config.sliding_window = 64
            probe(config, name)
            kind, found = "right", ""
        except UserError as error:
            kind, found = "refused", str(error).partition(" cannot be scored packed: ")[2]
        except Exception as error:  # noqa: BLE001 - report all other errors
            kind, found = "error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        counts[kind] += 1
        print(f"{name:28} {kind:8} {time.perf_counter() - started:5.2f} s  {found}", flush=True)
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
