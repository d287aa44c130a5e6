"""Prompts that are text: one, or one for each of several calls of an LM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_prompts.dln.layer import STRIPPED
from lightning_prompts.lm import FrozenLM
from lightning_prompts.lm.labels import HIDDEN
from lightning_prompts.methods import ChainOfThought, FewShot, FixedPrompt, PromptMethod
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.template import Template
from lightning_prompts.types import Example


@dataclass(frozen=True)
class Step:
    """One call of an LM.

    Attributes:
        prompt: The text in the prompt slot.
        templates: The text around it, by the task of a mixture; ``""`` where there is only one.
        model: The LM.
        stop: Regular expression; what is written ends where it first matches. ``None`` for the task's.
        max_new_tokens: How long it may get.
        question: The field of the data that ``{question}`` stands for.
    """

    prompt: str
    templates: Mapping[str, str]
    model: str
    stop: str | None = None
    max_new_tokens: int = 16
    question: str = "question"

    def place(self, example: Example, hidden: str | None) -> Example:
        """An example of the task as this call reads it.

        Args:
            example: From the task.
            hidden: What the call before has written; ``None`` in the first one.
        """
        text = self.templates.get(example.member, self.templates.get("", ""))
        own = str(example.fields.get(self.question, example.question))
        fields = {**example.fields, "question": own, HIDDEN: hidden,
                  "answer": None if example.answer is None else example.answer.strip()}  # fmt: skip
        stop = example.stop if self.stop is None else self.stop
        return Template(text, stop=stop, chat=example.chat, system=example.system).render(fields, example.source)

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Step:
        """The inverse of `record`."""
        return cls(**record)


def templates_of(data: Any) -> dict[str, str]:  # noqa: ANN401 - a datamodule, which this package does not import
    """The templates of a task, by the task of a mixture; ``""`` where there is only one."""
    if getattr(data, "own_templates", False):
        return {name: member.template.text for name, member in data.members.items()}
    return {"": data.template.text}


def steps_of(method: PromptMethod) -> list[Step]:
    """The texts of a restored method."""
    templates = templates_of(method.trainer.datamodule)  # type: ignore[attr-defined]
    model, length = method.lm.name, method.max_new_tokens
    if isinstance(method, ChainOfThought):
        return _chain_of_thought(method, templates)
    if isinstance(method, FewShot):
        solved = method.demonstrations.replace("{", "{{").replace("}", "}}")
        templates = {name: solved + text for name, text in templates.items()}
    if isinstance(method, TextPromptMethod):
        return _layers(method, templates)
    prompt = method.text if isinstance(method, FixedPrompt) else method.prompt_text()
    assert prompt is not None
    return [Step(prompt, templates, model, max_new_tokens=length)]


def _chain_of_thought(method: ChainOfThought, templates: Mapping[str, str]) -> list[Step]:
    """Reasoning, then the answer after it."""
    trigger, extraction = (text.replace("{", "{{").replace("}", "}}") for text in (method.trigger, method.extraction))
    asked, answered = {}, {}
    for name, text in templates.items():
        before, slot, after = text.rpartition("{answer}")
        asked[name] = f"{before.rstrip()}{trigger}{slot}"
        answered[name] = f"{before.rstrip()}{trigger} {{{HIDDEN}}}{extraction} {slot}{after}"
    model = method.lm.name
    return [
        Step(method.text, asked, model, method.reasoning_stop, method.reasoning_tokens),
        Step(method.text, answered, model, max_new_tokens=method.max_new_tokens),
    ]


def _layers(method: TextPromptMethod, templates: Mapping[str, str]) -> list[Step]:
    """A step for each layer, from the one that reads the input to the one that answers."""
    steps = []
    for layer, cached, prompt in zip(method.placed, method.network.lms, method.active_prompts(), strict=True):
        own = templates if layer.template is None else {"": layer.template}
        length = method.max_new_tokens if layer.top else layer.settings.max_new_tokens
        stop = None if layer.top else layer.settings.stop
        question = STRIPPED if layer.strips else "question"
        steps.append(Step(prompt, own, cached.lm.name, stop, length, question))
    return steps


def think(steps: Sequence[Step], lms: Sequence[FrozenLM], examples: Sequence[Example]) -> list[Example]:
    """Run all calls but the last, and place the examples in that one, prompts filled in.

    Args:
        steps: The calls.
        lms: The LM of each.
        examples: From the task.

    Returns:
        The examples as the last call reads them.
    """
    hidden: list[str | None] = [None] * len(examples)
    for step, lm in zip(steps[:-1], lms, strict=False):
        placed = [step.place(example, text) for example, text in zip(examples, hidden, strict=True)]
        ids = lm.encoder.tokens(step.prompt)
        vectors = lm.embed(torch.tensor(ids, dtype=torch.long, device=lm.device))
        hidden = list(lm.generate(placed, vectors, step.max_new_tokens))
    return [steps[-1].place(example, text) for example, text in zip(examples, hidden, strict=True)]
