"""A layer: an LM call with a prompt, from text to text."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from lightning_prompts.errors import UserError, check_at_least, check_stop
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.labels import HIDDEN
from lightning_prompts.template import Template
from lightning_prompts.types import Example

THINK = "Let's think step by step. {answer}"
THOUGHTS = "Your thoughts were:\n{hidden}\n\n"
STRIPPED = "stripped"  # optional field of the data: the input without answer options


@dataclass(frozen=True)
class LanguageLayer:
    r"""The settings of a layer.

    Attributes:
        prompt: Initial prompt; may be empty. ``None`` for the task's own instruction.
        template: Text with ``{prompt}``, ``{question}`` (the input x), ``{hidden}`` (the text of the layer below),
            other fields of the data, and ``{answer}`` at the end, the text of this layer. ``None`` for the paper's: a
            single layer uses the task's own template. With several layers, hidden layers reason step by step, and the
            top layer reads the text of the layer below and answers.
        residual: Whether the layer sees the input besides the text of the layer below.
        learn: Whether to train the prompt.
        strip_options: Use the data's field ``stripped``, the input without answer options, if there is one; ``None``
            does so in the first of several layers, as in the paper.
        max_new_tokens: Maximum length of a hidden text, in tokens.
        stop: Regular expression; a hidden text ends where it first matches.
        lm: The layer's own LM; ``None`` for the method's.
    """

    prompt: str | None = ""
    template: str | None = None
    residual: bool = True
    learn: bool = True
    strip_options: bool | None = None
    max_new_tokens: int = 64
    stop: str = r"\n\n"
    lm: LMConfig | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            UserError: See `Template`; ``stop`` is empty or no regular expression; or the template and ``residual``
                disagree.
        """
        check_at_least("layers.max_new_tokens", self.max_new_tokens)
        check_stop("layers.stop", self.stop)
        if self.template is not None:
            fields = Template(self.template).fields
            if not self.residual and "question" in fields:
                raise UserError("layers.residual is false, but the layer's template has {question}; drop one of them")


class PlacedLayer:
    """A layer at a position in the network; the position decides its default template and its input.

    Args:
        settings: Settings of the layer.
        index: Position of the layer, 0 for the layer that reads the input.
        count: ``N``, the number of layers.

    Raises:
        UserError: The template of the first layer has ``{hidden}``, or that of a later layer lacks it; or a single
            layer strips options without a template of its own.
    """

    def __init__(self, settings: LanguageLayer, index: int, count: int) -> None:
        """Choose the template."""
        self.settings, self.index = settings, index
        self.first, self.top = index == 0, index == count - 1
        self.strips = settings.strip_options if settings.strip_options is not None else self.first and not self.top
        self.template = settings.template
        if self.template is None and count > 1:
            seen = ("{question}\n\n" if settings.residual or self.first else "") + ("" if self.first else THOUGHTS)
            if not settings.residual and not self.first:
                seen = "{hidden}\n\n"
            self.template = f"{{prompt}}\n\n{seen}Answer: {{answer}}" if self.top else f"{seen}{{prompt}}\n{THINK}"
        if self.template is None and self.strips:
            raise UserError(
                "layers.strip_options is true, but a single layer without a template reads the task's own question; "
                "give the layer a template, or drop strip_options"
            )
        if self.template is not None:
            asks = HIDDEN in Template(self.template).fields
            if asks == self.first:
                raise UserError(
                    f"layer {index} of {count}: its template {'has' if asks else 'lacks'} {{hidden}}, the text of the "
                    f"layer below; {'there is none below the first' if asks else 'add it'}"
                )

    def question(self, example: Example) -> str:
        """Return the input as this layer sees it."""
        return str(example.fields.get(STRIPPED, example.question)) if self.strips else example.question

    def shown(self, example: Example, hidden: str) -> str:
        """Return the layer's input for a proposer; it contains only what the layer sees."""
        if self.first:
            return self.question(example)
        return f"{self.question(example)}\n\nThoughts: {hidden}" if self.settings.residual else f"Thoughts: {hidden}"

    def place(self, example: Example, hidden: str = "", hint: str = "") -> Example:
        """Return the example as this layer reads it, with an open prompt slot.

        Args:
            example: Example of the task.
            hidden: Text of the layer below.
            hint: Text after the input, for draws from a posterior; after ``hidden`` if the template has no input.

        Returns:
            An example whose answer is the layer's target: the task's answer for the top layer, ``None`` for others.

        Raises:
            UserError: There is a hint, and the template has neither ``{question}`` nor ``{hidden}``.
        """
        if self.template is None and not hint:
            return example
        if self.template is None:
            return replace(example, after=example.after + hint)
        answer = None if example.answer is None or not self.top else example.answer.strip()
        fields = {**example.fields, "question": self.question(example), "answer": answer}
        if not self.first:
            fields[HIDDEN] = hidden
        stop = example.stop if self.top else self.settings.stop
        template = _template(self.template, stop, example.chat, example.system)
        if hint:
            shown = next((name for name in ("question", HIDDEN) if name in template.fields), None)
            if shown is None:
                raise UserError(
                    f"layer {self.index}: GivenAnswer puts the target after {{question}}, which the layer's template "
                    "lacks; add it, or give posterior.templates without GivenAnswer"
                )
            fields[shown] = f"{fields[shown]}{hint}"
        placed = template.render(fields, example.source)
        return replace(
            example,
            before=placed.before,
            after=placed.after,
            answer=placed.answer,
            stop=stop,
            fields=fields,
            space=placed.space,
        )


@functools.lru_cache(maxsize=64)
def _template(text: str, stop: str, chat: bool, system: str | None) -> Template:
    return Template(text, stop=stop, chat=chat, system=system)
