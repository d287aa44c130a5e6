"""Class probabilities by the definition: one whole text at a time, with transformers' own attention."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_prompts.lm import FrozenLM
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
