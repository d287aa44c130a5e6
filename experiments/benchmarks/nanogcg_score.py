"""Score given candidates with the code of nanoGCG, in a separate environment.

    python experiments/benchmarks/nanogcg_score.py INPUT.json > OUTPUT.json

nanoGCG requires transformers 4.47 or older, so `hard_search.py` runs this file with the interpreter of an environment
with `pip install torch==2.13.0 nanogcg==0.3.0`. The input contains token ids. The script times the scoring of one step
of `nanogcg.run`: embedding, concatenation, and its loss function with its batch-size finder.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from nanogcg.gcg import GCG, GCGConfig
from nanogcg.utils import find_executable_batch_size


def load(folder: str) -> Any:
    """Load the model in float32. transformers 4.47 ignores `rope_parameters`, so set the rotary base explicitly."""
    config = transformers.AutoConfig.from_pretrained(folder)
    rope = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.rope_theta = float(rope["rope_theta"])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)


def prepare(model: Any, spec: dict[str, Any]) -> GCG:
    """Make a GCG object in the state of `GCG.run` before its first step."""
    gcg = GCG(model, SimpleNamespace(chat_template="-"), GCGConfig(allow_non_ascii=True))
    ids = {name: torch.tensor([spec[name]]) for name in ("before", "after", "target")}
    gcg.before_embeds, gcg.after_embeds, gcg.target_embeds = (gcg.embedding_layer(value) for value in ids.values())
    gcg.target_ids = ids["target"]
    with torch.no_grad():
        gcg.prefix_cache = model(inputs_embeds=gcg.before_embeds, use_cache=True).past_key_values
    return gcg


@torch.no_grad()
def score(gcg: GCG, candidates: torch.Tensor) -> torch.Tensor:
    """Compute the losses of candidates with the same lines as `GCG.run`."""
    width = len(candidates)
    embeddings = torch.cat(
        [
            gcg.embedding_layer(candidates),
            gcg.after_embeds.repeat(width, 1, 1),
            gcg.target_embeds.repeat(width, 1, 1),
        ],
        dim=1,
    )
    return find_executable_batch_size(gcg._compute_candidates_loss_original, width)(embeddings)


def main() -> dict[str, Any]:
    """Return the losses, and the seconds of each repetition."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    gcg = prepare(load(spec["model"]), spec)
    candidates = torch.tensor(spec["candidates"])
    seconds = []
    for _ in range(spec["repeats"]):
        start = time.perf_counter()
        losses = score(gcg, candidates)
        seconds.append(time.perf_counter() - start)
    return {"losses": losses.tolist(), "seconds": seconds, "transformers": transformers.__version__}


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):  # the batch-size finder prints
        result = main()
    print(json.dumps(result))
