"""Query vLLM with a trained prompt among the embeddings of the text.

    vllm serve MODEL --enable-prompt-embeds
    python example.py --server http://localhost:8000/v1 --fields '{"question": "hot"}'
    python example.py --offline --fields '{"question": "hot"}'

prompt.json beside this file contains MODEL and an example question. The script sends all embeddings before the answer
as one tensor [T, D]: those of the text before the prompt, the prompt, and those of the text after it. It needs torch
and transformers, and --offline also needs vLLM.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Path(__file__).parent


def tokens(tokenizer: PreTrainedTokenizerBase, text: str, start: bool, marks: dict[str, list[str]]) -> list[int]:
    """Tokenise a piece of text.

    Many tokenizers change the start of a text. A piece inside a text is therefore tokenised after a mark, whose tokens
    are then removed.

    Args:
        tokenizer: The tokenizer of the model.
        text: The piece.
        start: Whether the piece starts a sequence.
        marks: Marks in order of preference, for pieces that start with white space and for others.
    """
    for mark in [] if start or not text else marks["space" if text[:1].isspace() else "word"]:
        own = list(tokenizer.encode(mark, add_special_tokens=False))
        whole = list(tokenizer.encode(mark + text, add_special_tokens=False))
        if whole[: len(own)] == own:
            return whole[len(own) :]
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def embeddings(
    table: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    about: dict[str, Any],
    fields: dict[str, Any],
) -> torch.Tensor:
    """Compute the embeddings of all tokens before the answer.

    Args:
        table: The input embeddings of the model.
        tokenizer: The tokenizer of the model.
        prompt: The trained vectors, [P, D].
        about: The contents of prompt.json.
        fields: The fields of the template.

    Returns:
        The embeddings [T, D].
    """
    before, after = about["before"].format_map(fields), about["after"].format_map(fields).rstrip()
    bos_ids = list(about["bos_ids"])
    if about["chat"]:
        given = f"{before}{after}{about['system'] or ''}{tokenizer.chat_template}"
        slot = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in given)  # marks the prompt slot
        turns = [{"role": "user", "content": before + slot + after}]
        if about["system"] is not None:
            turns.insert(0, {"role": "system", "content": about["system"]})
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        (before, _, after), bos_ids = text.partition(slot), []
    front = torch.tensor(bos_ids + tokens(tokenizer, before, True, about["marks"]), dtype=torch.long, device="cpu")
    back = torch.tensor(tokens(tokenizer, after, False, about["marks"]), dtype=torch.long, device="cpu")
    return torch.cat([table(front), prompt.to(table(back).dtype), table(back)]).detach()


def encoded(vectors: torch.Tensor) -> str:
    """Encode vectors for the server: the output of torch.save in base64."""
    buffer = io.BytesIO()
    torch.save(vectors.clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def ask_server(url: str, model: str, vectors: torch.Tensor, max_tokens: int) -> str:
    """Request a completion from vLLM's OpenAI-compatible server."""
    # The server takes what is left out from the model's generation_config.
    greedy = {"temperature": 0, "repetition_penalty": 1.0}
    body = {"model": model, "prompt": "", "prompt_embeds": encoded(vectors), "max_tokens": max_tokens, **greedy}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def ask_offline(model: str, revision: str | None, vectors: torch.Tensor, max_tokens: int) -> str:
    """Generate a completion with vLLM in this process."""
    from vllm import LLM, SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=max_tokens)
    llm = LLM(model, revision=revision, enable_prompt_embeds=True)
    outputs = llm.generate({"prompt_embeds": vectors}, settings)
    return str(outputs[0].outputs[0].text)


def main() -> None:
    """Answer one question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = json.loads((HERE / "prompt.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=about["base_model"], help="the model for the embeddings of the text")
    parser.add_argument("--served", help="name of the model on the server; default: --model")
    parser.add_argument("--fields", type=json.loads, default=about["example"], help="fields of the template, as JSON")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", help="URL of vLLM's OpenAI-compatible server, including /v1")
    where.add_argument("--offline", action="store_true", help="run vLLM in this process")
    args = parser.parse_args()
    prompt = torch.load(HERE / "prompt_embeds.pt", weights_only=True)
    revision = about["revision"]
    table = AutoModelForCausalLM.from_pretrained(args.model, revision=revision).get_input_embeddings()
    tokenizer = AutoTokenizer.from_pretrained(args.model, revision=revision)
    vectors = embeddings(table, tokenizer, prompt, about, args.fields)
    if args.offline:
        text = ask_offline(args.model, revision, vectors, about["max_new_tokens"])
    else:
        text = ask_server(args.server, args.served or args.model, vectors, about["max_new_tokens"])
    end = re.search(about["stop"], text.lstrip())
    print(text.lstrip()[: end.start()].strip() if end else text.strip())


if __name__ == "__main__":
    main()
