"""Code for the model card that uses an export with an example of the task."""

from __future__ import annotations

import json

from lightning_prompts.export.contents import Updates
from lightning_prompts.export.formats import Export
from lightning_prompts.lm import slot_length
from lightning_prompts.types import Example

# Arguments of a tokenizer's call, to be tried in this order.
CALLS = {", add_special_tokens=False": False, "": True}


def code(text: str) -> str:
    """A Python block."""
    return f"```python\n{text}\n```\n"


def literal(text: str) -> str:
    """A text as Python writes it."""
    return json.dumps(text, ensure_ascii=False)


def load_model(export: Export) -> str:
    """The lines that load model and tokenizer."""
    more = "" if export.base.revision is None else f", revision={literal(export.base.revision)}"
    attention = "" if export.base.attention is None else f", attn_implementation={literal(export.base.attention)}"
    return (
        f"base = {literal(export.base.shown)}\n"
        f"tokenizer = AutoTokenizer.from_pretrained(base{more})\n"
        f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32{more}{attention})\n"
    )


def text_of(export: Export, example: Example) -> str:
    """The text that goes into the model with what was exported, up to the answer."""
    before, after, _ = export.run.method.lm.encoder.texts(example)
    if isinstance(export.content, Updates):
        return f"{before}{export.content.text}{after}"
    assert not isinstance(export.content, list)
    return after if slot_length(export.content) else f"{before}{after}"


def tokenizer_call(export: Export) -> str | None:
    """The arguments that a tokenizer wants beside the text, or ``None`` if one call does not give the same tokens."""
    tokenizer = export.run.method.lm.tokenizer
    wanted = [(text_of(export, example), export.pieces(example).after) for example in export.examples]
    for words, special in CALLS.items():
        if all(tokenizer.encode(text, add_special_tokens=special) == ids for text, ids in wanted):
            return words
    return None


def inputs(export: Export) -> str:
    """The line that makes ``inputs`` of the first example's text."""
    example = export.examples[0]
    text, call = text_of(export, example), tokenizer_call(export)
    if call is not None:
        return f'inputs = tokenizer({literal(text)}{call}, return_tensors="pt").input_ids\n'
    return (
        "# In one piece, this tokenizer cuts the text otherwise than in training, where the parts were cut apart.\n"
        f"inputs = torch.tensor([{export.pieces(example).after}])  # {literal(text)}\n"
    )


def embedding_snippet(export: Export, load: str, prompt: str) -> str:
    """Generating with vectors in the prompt slot.

    Args:
        export: What is exported.
        load: The lines that read the files.
        prompt: The expression for the vectors.
    """
    example = export.examples[0]
    pieces = export.pieces(example)
    before, after, _ = export.run.method.lm.encoder.texts(example)
    parts = [_embedded(export, before, pieces.before), prompt, _embedded(export, after, pieces.after)]
    return code(
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{load}\n{load_model(export)}table = model.get_input_embeddings()\n\n"
        "def embed(ids):\n    return table(torch.tensor(ids))\n\n"
        f"parts = [{', '.join(part for part in parts if part)}]\n"
        "output = model.generate(inputs_embeds=torch.cat(parts)[None], "
        f"max_new_tokens={export.run.method.max_new_tokens}, "
        "do_sample=False)\nprint(tokenizer.decode(output[0]))"
    )


def _embedded(export: Export, text: str, ids: list[int]) -> str:
    """The expression for a text's vectors, by its tokens where the tokenizer would cut it otherwise."""
    if not ids:
        return ""
    for words, special in CALLS.items():
        if export.run.method.lm.tokenizer.encode(text, add_special_tokens=special) == ids:
            return f"embed(tokenizer.encode({literal(text)}{words}))"
    return f"embed({ids})"


def cache_snippet(export: Export, load: str, pair: str) -> str:
    """Generating with keys and values in front of everything.

    Args:
        export: What is exported.
        load: The lines that read the files.
        pair: The expression for keys and values of ``layer``.
    """
    return code(
        "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache\n"
        f"{load}\n{load_model(export)}cache = DynamicCache()\n"
        "for layer in range(model.config.get_text_config().num_hidden_layers):\n"
        f"    key, value = {pair}  # [P, Hkv, Dh]\n"
        "    cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)\n"
        f"{inputs(export)}"
        "logits = model(inputs, past_key_values=cache).logits\n"
        "print(tokenizer.decode(logits[0, -1].argmax()))  # the answer's first token"
    )


def peft_snippet(export: Export, name: str) -> str:
    """Generating through PEFT.

    Args:
        export: What is exported.
        name: The adapter's folder.
    """
    return code(
        "import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"{load_model(export)}model = PeftModel.from_pretrained(model, {literal(name)})\n{inputs(export)}"
        f"output = model.generate(input_ids=inputs, max_new_tokens={export.run.method.max_new_tokens}, "
        "do_sample=False)\n"
        "print(tokenizer.decode(output[0, inputs.shape[1]:]))"
    )


def jinja(template: str) -> str:
    """A template in the syntax of lm-evaluation-harness."""
    for old, new in (("{{", "\0"), ("}}", "\1"), ("{", "{{"), ("}", "}}"), ("\0", "{"), ("\1", "}")):
        template = template.replace(old, new)
    return template
