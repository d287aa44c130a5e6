"""Export to ``prompt_embeds`` for vLLM, which has no adapters for prompt tuning, with a script that uses them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Any

import torch

from lightning_prompts.errors import UserError
from lightning_prompts.export import vllm_example
from lightning_prompts.export.formats import Export, Format, answer_nll
from lightning_prompts.prompts.from_peft import ABOUT

TENSOR, SCRIPT = "prompt_embeds.pt", "example.py"


class Vllm(Format):
    """The vectors in a file of ``torch.save``, and ``example.py``, which adds the embeddings of the text."""

    name = "vllm"
    title = "prompt embeddings for vLLM"
    library = "vllm"
    kinds = ("vectors",)

    def check(self, export: Export) -> None:
        """See `Format`.

        Raises:
            UserError: The datasets of a mixture have different templates.
        """
        if "" not in export.about["prompts"][0]["templates"]:
            raise UserError(
                "the example for vLLM supports one template, but the datasets of the mixture have different ones; use "
                "--format safetensors or npy, or set data.template"
            )

    def write(self, export: Export, folder: Path) -> None:
        """See `Format`."""
        torch.save(export.content, folder / TENSOR)
        shutil.copyfile(str(vllm_example.__file__), folder / SCRIPT)

    @torch.no_grad()
    def nll(self, export: Export, folder: Path) -> list[float]:
        """See `Format`; runs the vectors of the script with transformers instead of vLLM."""
        script, model = _module(folder / SCRIPT), export.base.load()
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        prompt = torch.load(folder / TENSOR, weights_only=True)
        tokenizer, table = export.run.method.lm.tokenizer, model.get_input_embeddings()
        scores = []
        for example in export.examples:
            vectors = script.embeddings(table, tokenizer, prompt, about, example.fields)
            answer = export.pieces(example).answer
            vectors = torch.cat([vectors, table(torch.tensor(answer, device="cpu"))])
            output: Any = model(inputs_embeds=vectors[None])
            scores.append(answer_nll(output.logits[0], answer))
        return scores

    def usage(self, export: Export, name: str) -> str:
        """See `Format`."""
        base = quote(export.base.named("the example for vLLM"))
        revision = "" if export.base.revision is None else f" --revision {quote(export.base.revision)}"
        script = quote(f"{name}/{SCRIPT}")
        return (
            "`example.py` sends the embeddings of all tokens before the answer to vLLM as one tensor:\n\n"
            f"```bash\nvllm serve {base}{revision} --enable-prompt-embeds\n"
            f"python {script} --server http://localhost:8000/v1\npython {script} --offline\n```\n\n"
            "The vectors that the script sends were checked with transformers (`inputs_embeds`); "
            f"vLLM itself was not run.{_classes(export)}"
        )


def _classes(export: Export) -> str:
    """Explain the difference between the script and a run with classes."""
    if not export.examples[0].labels:
        return ""
    return " The script generates text, whereas the run chooses the likeliest class; answers can differ.\n"


def _module(path: Path) -> ModuleType:
    """Import the exported script."""
    spec = importlib.util.spec_from_file_location("lightning_prompts_vllm_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
