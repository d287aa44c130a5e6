"""Compare scoring of candidate prompts with one Hugging Face forward pass per candidate, and with nanoGCG.

    python experiments/benchmarks/hard_search.py [--nanogcg PYTHON]

1. 64 candidates x 32 examples of 10 tokens (9 tokens and an answer of 1, with only the prompt in common), P = 20 and
   100. Hugging Face runs one forward pass per candidate over the concatenated texts, with logits at every position. All
   candidates take the same time, so the benchmark runs only some of them. It also compares the scores.
2. The same search with and without racing: seconds of scoring per step, the final validation loss, and the regret of
   the race's winners relative to the best of all candidates.
3. One message, 64 and 256 candidates: nanoGCG's scoring function in a separate environment (see nanogcg_score.py).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.embedded import embedded_folder
from lightning_prompts.lm.encoding import Row
from lightning_prompts.lm.passes import fill
from lightning_prompts.objectives import Likelihood
from lightning_prompts.prompts.vocabulary import allowed_tokens
from lightning_prompts.search.candidates import draw_candidates, top_tokens
from lightning_prompts.search.scoring import CandidateScorer, Racing, race

NAME = "smollm2-135m-instruct"
TEMPLATE = "{prompt} {question} is in English the opposite of the word {answer}"
CANDIDATES, EXAMPLES = 64, 32
OBJECTIVE = Likelihood(end_weight=0.0)
console = Console(stderr=True)


def ten_tokens(lm: FrozenLM, length: int, split: str) -> list[Row]:
    """Return rows with exactly 10 tokens of text, including the answer."""
    rows = lm.encode(Antonyms(template=TEMPLATE, min_count=0).examples(split), length)
    return [row for row in rows if len(row.context) == length + 9 and len(row.answer) == 1]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the duration in seconds and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.no_grad()
def hugging_face(model: Any, filled: list[Row]) -> Tensor:
    """Score one candidate on a batch of texts of equal length; return the NLL of the answers ``[N]``."""
    ids = torch.tensor([row.context + row.answer for row in filled])
    logits = model(input_ids=ids).logits.float()
    answers = torch.tensor([row.answer[0] for row in filled])
    return functional.cross_entropy(logits[:, -2], answers, reduction="none")


def replacements(lm: FrozenLM, ids: Tensor, rows: list[Row], generator: torch.Generator) -> Tensor:
    """Draw candidates as the search does, with one replaced token each, from the gradient on the batch."""
    vectors = lm.embed(ids).detach().requires_grad_(True)
    OBJECTIVE(lm.score_rows(rows, vectors)).backward()
    assert vectors.grad is not None
    top = top_tokens(vectors.grad @ lm.embedding_matrix().T, allowed_tokens(lm), 256)
    return draw_candidates(ids, top, CANDIDATES, 1, generator)


def initial(lm: FrozenLM, length: int) -> Tensor:
    """Make a static prompt of a given length, ``[P]``."""
    text = lm.encoder.tokens(" Each line says which word is the opposite of another, as in these:")
    return torch.tensor((text * length)[:length])


def against_hugging_face(lm: FrozenLM, model: Any, length: int, repeats: int, sample: int) -> dict[str, Any]:
    """Run part 1."""
    rows = ten_tokens(lm, length, "train")[:EXAMPLES]
    candidates = replacements(lm, initial(lm, length), rows, torch.Generator().manual_seed(0))
    scorer = CandidateScorer(lm)
    filled = fill(rows, candidates[:sample].tolist())
    ours: list[float] = []
    theirs: list[float] = []
    difference = 0.0
    for _ in track(range(repeats + 1), description=f"P = {length}", console=console):
        seconds, scores = timed(lambda: scorer.score(rows, candidates))
        ours.append(seconds / len(candidates))
        for c, part in enumerate(filled):
            seconds, nll = timed(lambda part=part: hugging_face(model, part))
            theirs.append(seconds)
            difference = max(difference, float((scores.nll[c] - nll).abs().max()))
    ours, theirs = ours[1:], theirs[sample:]  # the first round is a warm-up
    row = {
        "P": length,
        "hf_ms": 1e3 * statistics.median(theirs),
        "our_ms": 1e3 * statistics.median(ours),
        "difference": difference,
    }
    return {**row, "ratio": row["hf_ms"] / row["our_ms"]}


def search(
    lm: FrozenLM, steps: int, racing: Racing | None, hf_ms: float, seed: int, length: int = 20
) -> dict[str, Any]:
    """Run part 2: a plain search; with racing, also score all candidates, without timing this."""
    train, val = ten_tokens(lm, length, "train"), ten_tokens(lm, length, "val")[:96]
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ids, scorer, best, seconds, regrets = initial(lm, length), CandidateScorer(lm), float("inf"), [], []
    for _ in track(range(steps), description=f"search, racing {racing is not None}, seed {seed}", console=console):
        rows = draw.sample(train, EXAMPLES)
        candidates = torch.unique(torch.cat([ids[None], replacements(lm, ids, rows, generator)]), dim=0)
        taken, losses = timed(lambda r=rows, c=candidates: race(scorer, r, c, OBJECTIVE, racing))
        seconds.append(taken / len(candidates))
        if racing is not None:
            exact = race(scorer, rows, candidates, OBJECTIVE, None)
            regrets.append(float(losses.min() - exact.min()))
        ids = candidates[losses.argmin()]
        best = min(best, float(scorer.score(val, ids[None]).nll.mean()))
    milliseconds = 1e3 * statistics.mean(seconds)
    return {
        "racing": repr(racing),
        "seed": seed,
        "our_ms": milliseconds,
        "ratio": hf_ms / milliseconds,
        "validation": best,
        "steps_lost": sum(regret > 1e-6 for regret in regrets),
        "mean_regret": statistics.mean(regrets) if regrets else 0.0,
        "steps": steps,
    }


def against_nanogcg(lm: FrozenLM, python: str, count: int, repeats: int) -> dict[str, Any]:
    """Run part 3, alternating between a process of nanoGCG and a round of this project."""
    before = lm.encoder.tokens("Complete the sentence with the right words.", start=True)
    after = lm.encoder.tokens(" The opposite of hot is")
    target = lm.encoder.tokens(" cold, and the opposite of up is down.")
    ids = initial(lm, 20)
    rows = [Row(before + [-1 - p for p in range(20)] + after, target)]
    vectors = lm.embed(ids).detach().requires_grad_(True)
    OBJECTIVE(lm.score_rows(rows, vectors)).backward()
    assert vectors.grad is not None
    top = top_tokens(vectors.grad @ lm.embedding_matrix().T, allowed_tokens(lm), 256)
    candidates = draw_candidates(ids, top, count, 1, torch.Generator().manual_seed(0))
    scorer = CandidateScorer(lm)
    spec = {
        "model": str(embedded_folder(NAME)),
        "before": before,
        "after": after,
        "target": target,
        "candidates": candidates.tolist(),
        "repeats": repeats + 1,
    }
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        for _ in track(range(2), description=f"nanoGCG, {count} candidates", console=console):
            script = str(Path(__file__).parent / "nanogcg_score.py")
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            output = subprocess.run([python, script, str(path)], capture_output=True, check=True, env=environment)
            result = json.loads(output.stdout)
            theirs += result["seconds"][1:]
            rounds = [timed(lambda: scorer.score(rows, candidates)) for _ in range(repeats + 1)]
            ours += [seconds for seconds, _ in rounds[1:]]
    difference = float((rounds[-1][1].nll[:, 0] - torch.tensor(result["losses"])).abs().max())
    row = {
        "candidates": len(candidates),
        "nanogcg_s": statistics.median(theirs),
        "our_s": statistics.median(ours),
        "difference": difference,
    }
    return {**row, "ratio": row["nanogcg_s"] / row["our_s"]}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    heads = list(rows[0])
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            + " |"
        )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=8, help="candidates of 64 that Hugging Face scores")
    parser.add_argument("--steps", type=int, default=12, help="steps of each search")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--nanogcg", help="interpreter of an environment with nanoGCG; default: skip part 3")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/hard_search.json"))
    arguments = parser.parse_args()
    lm = FrozenLM.load(LMConfig(NAME))
    model = AutoModelForCausalLM.from_pretrained(embedded_folder(NAME), dtype=torch.float32).eval()
    grid = [against_hugging_face(lm, model, length, arguments.repeats, arguments.sample) for length in (20, 100)]
    show("64 candidates x 32 examples, milliseconds per candidate", grid)
    races = [
        search(lm, arguments.steps, racing, grid[0]["hf_ms"], seed)
        for seed in arguments.seeds
        for racing in (None, Racing())
    ]
    show("A search with P = 20, milliseconds per candidate", races)
    counts = (64, 256) if arguments.nanogcg else ()
    gcg = [against_nanogcg(lm, arguments.nanogcg, count, arguments.repeats) for count in counts]
    if gcg:
        show("One message, seconds per step's candidates", gcg)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"grid": grid, "races": races, "nanogcg": gcg}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
