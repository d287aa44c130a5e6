"""Export text prompts: ``prompt.txt`` with the text, ``prompt.json`` with the templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.export.formats import Export, Format, answer_nll
from lightning_prompts.export.texts import Step, sample_hidden
from lightning_prompts.export.usage import call_of, code, empty_examples, ids_code, imports, literal, load_model
from lightning_prompts.lm import FrozenLM, KeyValues
from lightning_prompts.methods.text_prompts import TextPromptMethod
from lightning_prompts.prompts.from_peft import ABOUT
from lightning_prompts.types import Example

FILE = "prompt.txt"


class PlainText(Format):
    """A text, or one text for each of several LM calls."""

    name = "text"
    title = "text"
    library = "transformers"
    kinds = ("text",)

    def check(self, export: Export) -> None:
        """See `Format`.

        Raises:
            UserError: Tokenising the text of the prompt gives other tokens.
        """
        method, steps = export.run.method, _steps(export)
        prompt = method.current_prompt()
        if isinstance(prompt, KeyValues) or len(steps) > 1:
            return
        ids = torch.tensor(method.lm.encoder.tokens(steps[0].prompt), dtype=torch.long, device=method.lm.device)
        if not torch.equal(method.lm.embed(ids).float(), prompt):
            raise UserError(
                f"tokenising the text of the prompt, {steps[0].prompt!r}, gives other tokens than the prompt has, so "
                "no text has the same scores; train with model.readable: true, which usually avoids this"
            )

    def write(self, export: Export, folder: Path) -> None:
        """See `Format`; ``prompt.txt`` has the prompt, or the templates of several LM calls or of an empty prompt."""
        (folder / FILE).write_text(_readable(_steps(export)), encoding="utf-8", newline="")

    @torch.no_grad()
    def nll(self, export: Export, folder: Path) -> list[float]:
        """See `Format`; tokenises the texts again and scores them with transformers."""
        steps, lms = self._read(folder), _lms(export)
        model: Any = export.base.load()
        scores = []
        for example in sample_hidden(steps, lms, export.examples):
            context, answer = _tokens(lms[-1], example, steps[-1].prompt)
            logits = model(input_ids=torch.tensor([context + answer], device="cpu")).logits[0]
            scores.append(answer_nll(logits, answer))
        return scores

    @staticmethod
    def _read(folder: Path) -> list[Step]:
        records = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["prompts"]
        if len(records) == 1 and records[0]["prompt"]:
            with (folder / FILE).open(encoding="utf-8", newline="") as file:
                records[0]["prompt"] = file.read()
        return [Step.from_record(record) for record in records]

    def usage(self, export: Export, name: str) -> str:
        """See `Format`."""
        steps, lms = _steps(export), _lms(export)
        if len(steps) > 1:
            return (
                f"`{ABOUT}` lists the {len(steps)} LM calls in order: the template, the prompt for `{{prompt}}`, and "
                "the maximum number of new tokens of each. The output of a call is `{hidden}` in the next one.\n"
            )
        examples, prompt = sample_hidden(steps, lms, export.examples), steps[0].prompt
        wanted = []
        for one in examples:
            before, after, _ = lms[0].encoder.texts(one)
            wanted.append((f"{before}{prompt}{after}", _tokens(lms[0], one, prompt)[0]))
        call, example = call_of(lms[0], wanted), examples[0]
        before, after, _ = lms[0].encoder.texts(example)
        # A chat template writes the start of a sequence (BOS) itself.
        words = call if call is not None else ", add_special_tokens=False" if example.chat else ""
        read = f'prompt = open({literal(f"{name}/{FILE}")}, encoding="utf-8", newline="").read()\n' if prompt else ""
        text = f"{literal(before)} + prompt + {literal(after)}" if prompt else literal(before + after)
        bare = empty_examples(export, replace(example, fields=export.examples[0].fields))
        contexts = [_tokens(lms[0], one, prompt)[0] for one in bare]
        usage = "Insert the prompt into `{prompt}` of the template without changing its white space.\n\n" + code(
            f"{imports('' if export.examples[0].labels else 're')}"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'{load_model(export)}{read}inputs = tokenizer({text}{words}, return_tensors="pt").input_ids\n'
            f"{ids_code(export, contexts)}"
        )
        if call is None:
            usage += (
                "\nTokenised in one piece, this text has other tokens than in training, where the parts around the "
                "prompt were tokenised separately, so scores may differ. `FixedPrompt` with the same text and template "
                "reproduces them.\n"
            )
        return usage


def _steps(export: Export) -> list[Step]:
    assert isinstance(export.content, list)
    return export.content


def _lms(export: Export) -> Sequence[FrozenLM]:
    """Return the LM of each call."""
    method = export.run.method
    if isinstance(method, TextPromptMethod):
        return [lm for cached in method.network.lms if isinstance(lm := cached.lm, FrozenLM)]
    return [method.lm] * len(_steps(export))


def _tokens(lm: FrozenLM, example: Example, prompt: str) -> tuple[list[int], list[int]]:
    """Return the tokens before the answer, and those of the answer."""
    ids = lm.encoder.tokens(prompt)
    row = lm.encoder.row(example, len(ids))
    return [ids[-1 - token] if token < 0 else token for token in row.context], row.answer


def _readable(steps: Sequence[Step]) -> str:
    """Return the prompt; the template of an empty prompt; or the templates of several LM calls under headings."""
    if len(steps) > 1:
        return "\n\n".join(f"[call {index}]\n{_filled(step)}" for index, step in enumerate(steps, start=1))
    return steps[0].prompt or _filled(steps[0])


def _filled(step: Step) -> str:
    """Return the templates with the prompt inserted."""
    return "\n\n".join(text.replace("{prompt}", step.prompt) for text in step.templates.values())
