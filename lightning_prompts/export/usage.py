"""Code snippets for the model card, which use the export on an example of the task."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lightning_prompts.export.contents import Updates
from lightning_prompts.export.formats import Export
from lightning_prompts.lm import FrozenLM, slot_length
from lightning_prompts.lm.labels import without_content
from lightning_prompts.types import Example

# Arguments of a call of a tokenizer, and their value of add_special_tokens, in order of preference.
CALLS = {", add_special_tokens=False": False, "": True}


def code(text: str) -> str:
    """Format a Python code block."""
    return f"```python\n{text}\n```\n"


def literal(text: str) -> str:
    """Format a text as a Python literal."""
    return json.dumps(text, ensure_ascii=False)


def load_model(export: Export) -> str:
    """Write the lines that load the model and the tokenizer."""
    more = "" if export.base.revision is None else f", revision={literal(export.base.revision)}"
    attention = "" if export.base.attention is None else f", attn_implementation={literal(export.base.attention)}"
    return (
        f"base = {literal(export.base.shown)}\n"
        f"tokenizer = AutoTokenizer.from_pretrained(base{more})\n"
        f"model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32{more}{attention})\n"
    )


def text_of(export: Export, example: Example) -> str:
    """Return the text before the answer that the model reads in addition to the exported vectors."""
    before, after, _ = export.run.method.lm.encoder.texts(example)
    if isinstance(export.content, Updates):
        return f"{before}{export.content.text}{after}"
    assert not isinstance(export.content, list)
    return after if slot_length(export.content) else f"{before}{after}"


def tokenizer_call(export: Export) -> str | None:
    """Find arguments with which one call of the tokenizer gives the tokens of the run; ``None`` if there are none."""
    wanted = [(text_of(export, example), export.pieces(example).after) for example in export.examples]
    return call_of(export.run.method.lm, wanted)


def call_of(lm: FrozenLM, wanted: Sequence[tuple[str, list[int]]]) -> str | None:
    """Find arguments with which a call of the tokenizer gives the tokens of each text; ``None`` if there are none."""
    for words, special in CALLS.items():
        if all(lm.tokenizer.encode(text, add_special_tokens=special) == ids for text, ids in wanted):
            return words
    return None


def inputs(export: Export) -> str:
    """Write the line that makes ``inputs`` from the text of the first example."""
    example = export.examples[0]
    text, call = text_of(export, example), tokenizer_call(export)
    if call is not None:
        return f'inputs = tokenizer({literal(text)}{call}, return_tensors="pt").input_ids\n'
    return (
        "# Training tokenised the parts of the text separately; in one piece, this tokenizer gives other tokens.\n"
        f"inputs = torch.tensor([{export.pieces(example).after}])  # {literal(text)}\n"
    )


def greedy(export: Export) -> str:
    """Write the arguments of ``generate`` that reproduce the run's greedy decoding, overriding the model's defaults."""
    lm = export.run.method.lm
    own = lm.model.generation_config
    words = [f"max_new_tokens={export.run.method.max_new_tokens}", "do_sample=False"]
    if ends := sorted(lm.end_tokens()):
        words.append(f"eos_token_id={ends}")
    for name, plain in (("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0)):
        if getattr(own, name, None) not in (None, plain):
            words.append(f"{name}={plain}")
    return ", ".join(words)


def answer_code(export: Export, ids: str) -> str:
    """Write the lines that print a generated answer up to the stop pattern of the run.

    Args:
        export: The export.
        ids: Expression for the generated tokens.
    """
    return (
        f"text = tokenizer.decode({ids}, skip_special_tokens=True).lstrip()\n"
        f"end = re.search({literal(export.examples[0].stop)}, text)\n"
        "print((text[: end.start()] if end else text).strip())"
    )


def class_code(export: Export, context: str, model: str, empty: Sequence[str]) -> str:
    """Write the lines that print the likeliest class, as the run chooses it.

    Args:
        export: The export.
        context: Expression for all tokens before the answer.
        model: Call of the model with ``context`` and the tokens ``ids`` after it.
        empty: Expressions for contexts without content, for runs with calibration; see `empty_examples`.
    """
    example, encoder = export.examples[0], export.run.method.lm.encoder
    known = encoder.label_tokens(example)
    classes = {
        names[0]: [list(ids) for ids, owner in zip(known.tokens, known.owners, strict=True) if owner == index]
        for index, names in enumerate(example.labels)
    }
    ways = "".join(f"    {literal(name)}: {ids},\n" for name, ids in classes.items())
    code = (
        f"classes = {{  # tokens of each verbaliser, with the end of the answer if classes begin alike\n{ways}}}\n\n"
        "@torch.no_grad()\ndef log_probs(context):\n    found = []\n    for ways in classes.values():\n"
        f"        logits = [{model}.logits[0, -len(ids) - 1 : -1] for ids in ways]\n"
        "        sums = [part.log_softmax(-1)[range(len(ids)), ids].sum() for part, ids in zip(logits, ways)]\n"
        "        found.append(torch.stack(sums).logsumexp(0))\n    return torch.stack(found).log_softmax(0)\n\n"
        f"scores = log_probs({context})\n"
    )
    if empty:
        code += (
            f"# Calibration: subtract the score without a question.\nempty = [{', '.join(empty)}]\n"
            "scores -= torch.stack([log_probs(context) for context in empty]).logsumexp(0)\n"
        )
    return code + "print(list(classes)[scores.argmax()])"


def empty_examples(export: Export, example: Example) -> list[Example]:
    """Return the content-free versions of an example, if the run calibrates classes with them."""
    return without_content(example) if export.run.method.lm_config.calibrate_labels else []


def embedding_snippet(export: Export, load: str, prompt: str) -> str:
    """Write code that generates an answer or chooses a class with vectors in the prompt slot.

    Args:
        export: The export.
        load: Lines that read the files.
        prompt: Expression for the vectors.
    """
    example = export.examples[0]
    pieces = export.pieces(example)
    before, after, _ = export.run.method.lm.encoder.texts(example)
    parts = [_embedded(export, before, pieces.before), prompt, _embedded(export, after, pieces.after)]
    if example.labels:
        empty = []
        for bare in empty_examples(export, example):
            own = export.pieces(bare)
            empty.append(f"torch.cat([embed({own.before}), {prompt}, embed({own.after})])")
        model = "model(inputs_embeds=torch.cat([context, embed(ids)])[None])"
        answer = class_code(export, "torch.cat(parts)", model, empty)
    else:
        answer = (
            f"output = model.generate(inputs_embeds=torch.cat(parts)[None], {greedy(export)})\n"
            f"{answer_code(export, 'output[0]')}"
        )
    return code(
        f"{imports('re' if not example.labels else '')}from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{load}\n{load_model(export)}table = model.get_input_embeddings()\n\n"
        "def embed(ids):\n    return table(torch.tensor(ids, dtype=torch.long))\n\n"
        f"parts = [{', '.join(part for part in parts if part)}]\n{answer}"
    )


def imports(*names: str) -> str:
    """Write the lines that import modules, with torch last."""
    return "".join(f"import {name}\n" for name in (*names, "torch") if name)


def ids_code(export: Export, contexts: Sequence[Sequence[int]]) -> str:
    """Write the lines that generate an answer to ``inputs``, or choose its class.

    Args:
        export: The export.
        contexts: Token ids of the first example without content, for runs with calibration.
    """
    if export.examples[0].labels:
        empty = [f"torch.tensor([{list(ids)}])" for ids in contexts]
        return class_code(export, "inputs", "model(input_ids=torch.cat([context, torch.tensor([ids])], 1))", empty)
    return (
        f"output = model.generate(input_ids=inputs, {greedy(export)})\n"
        f"{answer_code(export, 'output[0, inputs.shape[1]:]')}"
    )


def _embedded(export: Export, text: str, ids: list[int]) -> str:
    """Write an expression for the embeddings of a text; use token ids if the tokenizer would give other tokens."""
    if not ids:
        return ""
    call = call_of(export.run.method.lm, [(text, ids)])
    return f"embed({ids})" if call is None else f"embed(tokenizer.encode({literal(text)}{call}))"


def cache_snippet(export: Export, load: str, pair: str) -> str:
    """Write code that prints the first token or the class of an answer with keys and values before all tokens.

    Args:
        export: The export.
        load: Lines that read the files.
        pair: Expression for the keys and values of ``layer``.
    """
    example = export.examples[0]
    model = "model(context, past_key_values=copy.deepcopy(cache))"
    if example.labels:
        empty = [f"torch.tensor([{export.pieces(one).after}])" for one in empty_examples(export, example)]
        longer = model.replace("context", "torch.cat([context, torch.tensor([ids])], 1)")
        answer = class_code(export, "inputs", longer, empty)
    else:
        answer = (
            "logits = model(inputs, past_key_values=cache).logits\n"
            "print(tokenizer.decode(logits[0, -1].argmax()))  # the first token of the answer"
        )
    return code(
        f"{imports('copy' if example.labels else '')}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache\n"
        f"{load}\n{load_model(export)}cache = DynamicCache()\n"
        "for layer in range(model.config.get_text_config().num_hidden_layers):\n"
        f"    key, value = {pair}  # [P, Hkv, Dh]\n"
        "    cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)\n"
        f"{inputs(export)}{answer}"
    )


def peft_snippet(export: Export, name: str) -> str:
    """Write code that generates an answer with PEFT.

    Args:
        export: The export.
        name: Folder of the adapter.
    """
    example = export.examples[0]
    contexts = [export.pieces(one).after for one in empty_examples(export, example)]
    return code(
        f"{imports('re' if not example.labels else '')}"
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"{load_model(export)}model = PeftModel.from_pretrained(model, {literal(name)})\n{inputs(export)}"
        f"{ids_code(export, contexts)}"
    )


def jinja(template: str) -> str:
    """Convert a template to the syntax of lm-evaluation-harness."""
    for old, new in (("{{", "\0"), ("}}", "\1"), ("{", "{{"), ("}", "}}"), ("\0", "{"), ("\1", "}")):
        template = template.replace(old, new)
    return template
