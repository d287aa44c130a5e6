"""Export to PEFT adapters: prompt tuning, prefix tuning, LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_prompts.errors import UserError, check_installed
from lightning_prompts.export.formats import Export, Format, answer_nll
from lightning_prompts.export.usage import jinja, literal, peft_snippet
from lightning_prompts.lm import KeyValues

if TYPE_CHECKING:
    from peft import PeftConfig

TENSORS = "adapter_model.safetensors"


class PeftAdapter(Format):
    """An adapter for ``PeftModel.from_pretrained``.

    PEFT puts virtual tokens before all text. The text before the prompt slot (BOS, the start of a template) must
    therefore be the same for all questions; its embeddings become virtual tokens, with the same result. A prefix is
    stored like the KV cache of transformers: keys and values of positions 0 to P - 1 with rotary embeddings applied.
    This project trains prefixes in the same form.
    """

    name = "peft"
    title = "a PEFT adapter"
    library = "peft"
    kinds = ("vectors", "keys and values", "weight updates")

    def check(self, export: Export) -> None:
        """See `Format`.

        Raises:
            UserError: PEFT is not installed, the text before the prompt slot differs between questions, or the shapes
                of keys and values differ between layers.
        """
        check_installed("--format peft", "export", "peft")
        if export.kind == "vectors":
            fronts = list(dict.fromkeys((one.before, one.chat, one.system) for one in export.run.examples()))
            if len(fronts) > 1:
                raise UserError(
                    "PEFT puts virtual tokens before all text, but the text before {prompt} differs between questions "
                    f"({_short(fronts[0][0])}, {_short(fronts[1][0])}); use --format safetensors, npy or vllm"
                )
        if isinstance(export.content, KeyValues):
            widths = {shape for pair in export.content.widths for shape in pair}
            if len(widths) > 1:
                raise UserError(
                    f"PEFT supports prefixes with one shape of keys and values, but {export.base.config.name} has "
                    f"{', '.join(str(list(shape)) for shape in sorted(widths))}; use --format safetensors or npy"
                )

    def write(self, export: Export, folder: Path) -> None:
        """See `Format`."""
        config, tensors = self._adapter(export)
        config.base_model_name_or_path = export.base.named("a PEFT adapter")
        config.revision = export.base.revision
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / TENSORS, {"format": "pt"})

    def _adapter(self, export: Export) -> tuple[PeftConfig, dict[str, Tensor]]:
        from peft import PrefixTuningConfig, PromptTuningConfig

        content = export.content
        if isinstance(content, Tensor):
            lm = export.run.method.lm
            front = torch.tensor(self.front(export), dtype=torch.long, device="cpu")
            vectors = torch.cat([lm.embed(front).float(), content])
            prompt = PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=len(vectors),
                token_dim=lm.width,
                num_transformer_submodules=1,
                num_layers=lm.layers,
            )
            return prompt, {"prompt_embeddings": vectors}
        if isinstance(content, KeyValues):
            heads, width = content.widths[0][0]
            prefix = PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=content.length,
                token_dim=heads * width,
                num_transformer_submodules=1,
                num_attention_heads=heads,
                num_layers=len(content.layers),
                encoder_hidden_size=heads * width,
                prefix_projection=False,
            )
            return prefix, {"prompt_embeddings": content.flatten()}
        assert not isinstance(content, list)
        return copy.copy(content.config), dict(content.tensors)

    @staticmethod
    def front(export: Export) -> list[int]:
        """Return the tokens before the prompt slot, which are the same for all questions."""
        return export.pieces(export.examples[0]).before

    @torch.no_grad()
    def nll(self, export: Export, folder: Path) -> list[float]:
        """See `Format`.

        Raises:
            UserError: PEFT fails to run the adapter with this model.
        """
        from peft import PeftModel

        scores = []
        try:
            model: Any = PeftModel.from_pretrained(export.base.load(), str(folder)).eval()
            for example in export.examples:
                pieces = export.pieces(example)
                ids = torch.tensor([pieces.after + pieces.answer], device="cpu")
                scores.append(answer_nll(model(input_ids=ids).logits[0], pieces.answer))
        except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise UserError(
                f"PEFT fails to run the adapter with {export.base.config.name} ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]})"
            ) from error
        return scores

    def usage(self, export: Export, name: str) -> str:
        """See `Format`."""
        return peft_snippet(export, name) + _harness(export, name)


def _harness(export: Export, name: str) -> str:
    """Explain how to evaluate the adapter with lm-evaluation-harness."""
    about = export.about
    if about["chat"] or "" not in about["prompts"][0]["templates"]:
        return ""
    text = about["after"] if export.kind == "vectors" else f"{about['before']}{{prompt}}{about['after']}"
    asked = jinja(text).replace("{{prompt}}", about["prompts"][0]["prompt"])
    gap = asked[len(asked.rstrip()) :]
    bos = ",add_bos_token=True" if about["bos_ids"] and export.kind != "vectors" else ""
    base = export.base.named("a PEFT adapter")
    revision = "" if export.base.revision is None else f",revision={export.base.revision}"
    model = quote(f"pretrained={base}{revision},peft={name}{bos}")
    batch = ""
    if export.kind != "weight updates":
        batch = (
            "\nUse `--batch_size 1`. In larger batches, the harness puts padding between the virtual tokens and "
            "shorter texts, which changes some answers.\n"
        )
    return (
        "\nIn lm-evaluation-harness, for your own task (with a list of choices, set `target_delimiter` to "
        f"{literal(gap)}):\n\n"
        f"```yaml\ndoc_to_text: {literal(asked.rstrip())}\n"
        f'target_delimiter: ""\ndoc_to_target: {literal(gap + "{{answer}}")}\n```\n\n'
        f"```bash\nlm_eval --model hf --model_args {model} --include_path FOLDER --tasks TASK"
        f"{' --batch_size 1' if batch else ''}\n```\n{batch}"
    )


def _short(text: str) -> str:
    return repr(text if len(text) < 40 else text[:37] + "...")
