"""Compare the device with the CPU, with the same weights in float32."""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from torch import Tensor

from gpu_check_parts.base import SHAPES, attempt, compared, load, normal
from gpu_check_parts.methods import small_data, trainer
from gpu_check_parts.packed import INFILL, PAIRS, examples
from gpu_check_parts.rows import Row, Settings
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.lm import FrozenLM, LMConfig, Sampling, label_scores
from lightning_prompts.methods import SoftPromptTuning
from lightning_prompts.search.scoring import CandidateScorer
from lightning_prompts.template import Template
from lightning_prompts.types import Example

SECONDS = 60  # for one job
TOLERANCE = 1e-4
CHECKPOINT = "checkpoint"
LABELS = (("yes", "correct", "yes it is"), ("no",))


def jobs(settings: Settings) -> list[str]:
    """List all architectures, and a checkpoint."""
    del settings
    return [*SHAPES, CHECKPOINT]


def run(name: str, settings: Settings) -> list[Row]:
    """Compare the results of the LM for the same texts."""
    if name == CHECKPOINT:
        return [attempt("cpu", name, partial(_checkpoint, settings))]
    here, there = load(SHAPES[name], "cpu"), load(SHAPES[name], settings.device)
    rows = [attempt("cpu", f"{name}, same random weights", partial(_weights, name, here, there))]
    there.model.load_state_dict(here.model.state_dict())
    for what, measure in MEASURES.items():
        case = f"{name}, {what}"
        rows.append(attempt("cpu", case, lambda c=case, m=measure: compared("cpu", c, m(there), m(here), TOLERANCE)))
    for what, sampling in (("greedy texts", None), ("drawn texts", Sampling(1.0, range(len(PAIRS))))):
        rows.append(attempt("cpu", f"{name}, {what}", partial(_texts, f"{name}, {what}", here, there, sampling)))
    return rows


def _weights(name: str, here: FrozenLM, there: FrozenLM) -> Row:
    ours = there.model.state_dict()
    other = [key for key, value in here.model.state_dict().items() if not torch.equal(value, ours[key].cpu())]
    return Row("cpu", f"{name}, same random weights", f"{len(other)} of {len(ours)} differ", "none", not other)


def _losses(lm: FrozenLM) -> Tensor:
    scores = lm.score(examples(INFILL), normal(lm, 5))
    return torch.stack([scores.nll, scores.tokens.float(), scores.greedy.float()])


def _gradient(lm: FrozenLM) -> Tensor:
    prompt = normal(lm, 5)
    return torch.autograd.grad(lm.score(examples(INFILL), prompt).nll.mean(), prompt)[0]


def _prefix(lm: FrozenLM) -> Tensor:
    return lm.key_values(normal(lm, 9).detach()).flatten()


def _continuations(lm: FrozenLM) -> Tensor:
    rows = lm.encode(examples(INFILL), 3)
    texts = [[lm.encoder.tokens(text) for text in (" out", " outside", " b")] for _ in rows]
    return lm.continuation_scores([row.context for row in rows], texts, normal(lm, 3))


def _labels(lm: FrozenLM) -> Tensor:
    template = Template("{prompt}{question}\nAnswer: {answer}")
    rows: list[Example] = [
        template.render({"question": question, "answer": answer}, labels=LABELS)
        for question, answer in (("Is it?", "yes"), ("What is that, over there?", "no"))
    ]
    return label_scores(lm, rows, normal(lm, 5).detach()).log_probs


def _states(lm: FrozenLM) -> Tensor:
    rows = [lm.encoder.tokens(question) for question, _ in PAIRS]
    return torch.cat(lm.hidden_states(rows, torch.zeros(0, lm.width, device=lm.device)))


def _candidates(lm: FrozenLM) -> Tensor:
    ids = torch.randint(40, 120, (6, 4), generator=torch.Generator().manual_seed(0), device="cpu").to(lm.device)
    return CandidateScorer(lm).score(lm.encode(examples(INFILL), 4, with_end=True), ids).nll


MEASURES = {
    "losses": _losses,
    "gradients": _gradient,
    "prefix of a text": _prefix,
    "continuation_scores": _continuations,
    "label_scores": _labels,
    "hidden_states": _states,
    "candidates": _candidates,
}


def _texts(name: str, here: FrozenLM, there: FrozenLM, sampling: Sampling | None) -> Row:
    found, wanted = (
        lm.generate_tokens(lm.encode(examples(INFILL), 5), normal(lm, 5).detach(), 8, sampling=sampling)
        for lm in (there, here)
    )
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    return Row("cpu", name, f"{same} of {len(wanted)} the same", "all", same == len(wanted))


def _checkpoint(settings: Settings) -> Row:
    """Compare a prompt that was trained on the device with the same prompt on the CPU."""
    folder = settings.scratch / CHECKPOINT

    def method() -> SoftPromptTuning:
        return SoftPromptTuning(3, lm=LMConfig(SHAPES["llama"]), max_new_tokens=2)

    def data() -> Antonyms:
        return small_data(settings)

    L.seed_everything(1)
    fitted = method()
    fit = trainer(folder, settings.device, max_steps=3)
    fit.fit(fitted, datamodule=data(), weights_only=True)
    fit.save_checkpoint(folder / "x.ckpt")
    there = trainer(folder, settings.device).test(fitted, datamodule=data(), verbose=False, weights_only=True)[0]
    here = trainer(folder, "cpu").test(
        method(), datamodule=data(), ckpt_path=folder / "x.ckpt", verbose=False, weights_only=True
    )[0]
    found, wanted = (torch.tensor([metrics[key] for key in sorted(there)], device="cpu") for metrics in (here, there))
    return compared("cpu", CHECKPOINT, found, wanted, TOLERANCE)
