"""Scores by the definition, with transformers' own masks and attention: whole texts, without packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_prompts.lm import FrozenLM, Scores, answer_scores
from lightning_prompts.template import Template
from lightning_prompts.types import Example

TWO = (("yes", "correct", "yes it is"), ("no",))
ALIKE = (("1", "one"), ("10",), ("no",), ("no way", "nope"))  # of bytes: 1 begins 10, no begins no way and nope


TEMPLATES = {
    "prompt first": "{prompt}{question}\nAnswer: {answer}",
    "example first": "Q: {question}\n{prompt}\n{answer}",
}


@torch.no_grad()
def plain_sum(lm: FrozenLM, context: list[int], answer: list[int], vectors: torch.Tensor) -> float:
    """Log-probability of an answer: one whole text, transformers' own attention, logits everywhere."""
    index = torch.tensor(context + answer)
    embeddings = lm.embed(index.clamp(min=0)).clone()
    embeddings[index < 0] = vectors[-1 - index[index < 0]].to(embeddings.dtype)
    logits = lm.model(inputs_embeds=embeddings[None]).logits[0].float().log_softmax(-1)
    start = len(context) - 1
    return float(sum(logits[start + i, token] for i, token in enumerate(answer)))


def plain_sequences(lm: FrozenLM, example: Example) -> list[set[tuple[int, ...]]]:
    """The ways to write each class, with their ends if one class's way begins another's."""
    classes = [
        {tuple(lm.encoder.tokens(space + text)) for text in verbalisers for space in ("", " ")}
        for verbalisers in example.labels
    ]
    if not any(
        mine != other and one == two[: len(one)]
        for mine in range(len(classes))
        for other in range(len(classes))
        for one in classes[mine]
        for two in classes[other]
    ):
        return classes
    end = lm.encoder.row(replace(example, answer="x"), 1, with_end=True).end or [lm.tokenizer.eos_token_id]
    return [{(*ids, *end) for ids in sequences} for sequences in classes]


def plain_classes(lm: FrozenLM, example: Example, vectors: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[Y]`` by the definition."""
    context = lm.encode([replace(example, answer=None)], len(vectors))[0].context
    sums = []
    for sequences in plain_sequences(lm, example):
        values = [plain_sum(lm, context, list(ids), vectors) for ids in sequences]
        sums.append(torch.tensor(values).logsumexp(0))
    return torch.stack(sums).log_softmax(0)


def alike(end: str | None = "\n", name: str = "prompt first") -> list[Example]:
    """Two sets of labels: one of labels that begin alike, one of others."""
    template = Template(f"{TEMPLATES[name]}{end or ''}")
    rows = [("How many are there?", "10", ALIKE), ("Is it?", "yes", TWO), ("Or so?", "no way", ALIKE)]
    return [
        replace(template.render({"question": q, "answer": a}, labels=labels), end=end, chat=end is None)
        for q, a, labels in rows
    ]


def score_plain(
    lm: FrozenLM, examples: Sequence[Example], prompt: Tensor, padding: Literal["left", "right"] = "right"
) -> Scores:
    """Compute `FrozenLM.score` without packing or shared prefixes.

    Args:
        lm: The model.
        examples: ``B`` examples with answers.
        prompt: ``[P, D]`` or ``[B, P, D]``.
        padding: The side of the padding tokens.
    """
    rows = lm.encode_answers(examples, prompt)
    full = [row.context + row.answer for row in rows]  # without the text after the answer
    width = max(map(len, full))
    starts = [width - len(ids) if padding == "left" else 0 for ids in full]
    prompts = prompt if prompt.dim() == 3 else prompt.expand(len(rows), *prompt.shape)
    mask = torch.zeros(len(rows), width, dtype=torch.long, device=lm.device)
    filled = []
    for b, (ids, start) in enumerate(zip(full, starts, strict=True)):
        index = torch.tensor(ids, device=lm.device)
        vectors = lm.embed(index.clamp(min=0))
        soft = prompts[b][(-1 - index).clamp(min=0)] if prompts.shape[1] else vectors
        vectors = torch.where((index < 0)[:, None], soft.to(vectors.dtype), vectors)
        filled.append(torch.nn.functional.pad(vectors, (0, 0, start, width - start - len(ids))))
        mask[b, start : start + len(ids)] = 1
    embeddings = torch.stack(filled)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = lm.model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits.float()
    kept = [
        logits[b, start + len(ids) - len(row.answer) - 1 : start + len(ids) - 1]
        for b, (row, ids, start) in enumerate(zip(rows, full, starts, strict=True))
    ]
    return answer_scores(torch.cat(kept), rows)
