"""Text prompts: one prompt, or one for each of several LM calls."""

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
    """One LM call.

    Attributes:
        prompt: Text in the prompt slot.
        templates: Templates by dataset of a mixture; the key is ``""`` if there is only one template.
        model: Name of the LM.
        stop: Regular expression; the output ends at its first match. ``None`` for that of the task.
        max_new_tokens: Maximum length of the output in tokens.
        question: Field of the data for ``{question}``.
    """

    prompt: str
    templates: Mapping[str, str]
    model: str
    stop: str | None = None
    max_new_tokens: int = 16
    question: str = "question"

    def place(self, example: Example, hidden: str | None) -> Example:
        """Render an example with the template of this call.

        Args:
            example: An example of the task.
            hidden: Output of the call before; ``None`` in the first call.
        """
        text = self.templates.get(example.member, self.templates.get("", ""))
        own = str(example.fields.get(self.question, example.question))
        answer = None if example.answer is None else example.answer.strip()
        fields = {**example.fields, "question": own, HIDDEN: hidden, "answer": answer}
        stop = example.stop if self.stop is None else self.stop
        return Template(text, stop=stop, chat=example.chat, system=example.system).render(fields, example.source)

    def record(self) -> dict[str, Any]:
        """Convert to a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Step:
        """Invert `record`."""
        return cls(**record)


def templates_of(data: Any) -> dict[str, str]:  # noqa: ANN401 - a datamodule, which this package does not import
    """Return the templates of a task by dataset of a mixture; the key is ``""`` if there is only one template."""
    if getattr(data, "own_templates", False):
        return {name: member.template.text for name, member in data.members.items()}
    return {"": data.template.text}


def steps_of(method: PromptMethod) -> list[Step]:
    """Return the LM calls of a restored method."""
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
    """Return two calls: one for the reasoning, and one for the answer."""
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
    """Return one call per layer, from the layer that reads the input to the layer that answers."""
    steps = []
    for layer, cached, prompt in zip(method.placed, method.network.lms, method.active_prompts(), strict=True):
        own = templates if layer.template is None else {"": layer.template}
        length = method.max_new_tokens if layer.top else layer.settings.max_new_tokens
        stop = None if layer.top else layer.settings.stop
        question = STRIPPED if layer.strips else "question"
        steps.append(Step(prompt, own, cached.lm.name, stop, length, question))
    return steps


def sample_hidden(steps: Sequence[Step], lms: Sequence[FrozenLM], examples: Sequence[Example]) -> list[Example]:
    """Generate the outputs of all calls but the last, and render the examples for the last call.

    Args:
        steps: The calls.
        lms: The LM of each call.
        examples: Examples of the task.

    Returns:
        The examples for the last call.
    """
    hidden: list[str | None] = [None] * len(examples)
    for step, lm in zip(steps[:-1], lms, strict=False):
        placed = [step.place(example, text) for example, text in zip(examples, hidden, strict=True)]
        ids = lm.encoder.tokens(step.prompt)
        vectors = lm.embed(torch.tensor(ids, dtype=torch.long, device=lm.device))
        hidden = list(lm.generate(placed, vectors, step.max_new_tokens))
    return [steps[-1].place(example, text) for example, text in zip(examples, hidden, strict=True)]
