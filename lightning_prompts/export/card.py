"""The model card: what the folder is, how it was made and how good it is, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lightning_prompts.errors import UserError
from lightning_prompts.export.contents import Kind
from lightning_prompts.export.formats import Export, Format
from lightning_prompts.export.public import LEFT_OUT, without_places
from lightning_prompts.lm.embedded import EMBEDDED
from lightning_prompts.prompts.from_peft import ABOUT

TAGS: dict[Kind, str] = {"vectors": "prompt-tuning", "keys and values": "prefix-tuning", "weight updates": "lora",
                         "text": "prompt-optimization"}  # fmt: skip
METRICS = {"nll": "NLL (nats per answer token)", "exact_match": "exact match", "accuracy": "accuracy",
           "relaxed_nll": "NLL of the relaxed prompt"}  # fmt: skip


def card(export: Export, made: Format, name: str, differences: list[float]) -> str:
    """The folder's README.md.

    Args:
        export: What is exported.
        made: The format.
        name: What the folder is called.
        differences: Of NLL, exported against ours, for each example of the check.
    """
    run, metrics = export.run, metrics_of(export)
    parts = [
        f"---\n{front_matter(export, made, name, metrics)}\n---\n",
        f"# {run.method_name} for {_task(export)}, as {made.title}\n",
        f"{_sentence(export)} Made with lightning-prompts.\n",
        f"## Use\n\nRun this in the folder that holds `{name}`.\n\n{_base(export)}{made.usage(export, name)}",
        f"## Text\n\n{_text(export)}",
        f"## Measured\n\n{_table(metrics)}{_checked(differences)}",
        f"## Made from\n\n{_config(export)}",
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def metrics_of(export: Export) -> dict[str, float]:
    """The run's ``metrics.json``; empty where the run was not tested.

    Raises:
        UserError: The file is damaged.
    """
    path = export.run.folder / "metrics.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(value) for name, value in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); test the run again") from error


def front_matter(export: Export, made: Format, name: str, metrics: Mapping[str, float]) -> str:
    """What the hub reads, in YAML."""
    results = [
        EvalResult(task_type="text-generation", dataset_type=_task(export), dataset_name=_task(export),
                   metric_type=kind, metric_name=METRICS[kind], metric_value=value, dataset_split=split)
        for split, kind, value in _rows(metrics)
    ]  # fmt: skip
    data = ModelCardData(
        base_model=export.base.hub_id,
        library_name=made.library,
        tags=["lightning-prompts", export.run.method_name, TAGS[export.kind]],
        datasets=_datasets(export),
        metrics=sorted({kind for _, kind, _ in _rows(metrics)}) or None,
        pipeline_tag="text-generation",
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _rows(metrics: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Test set, kind of metric, value."""
    split = [(key.rpartition("/"), value) for key, value in metrics.items() if key.startswith("test/")]
    return [(name, kind, value) for (name, _, kind), value in split if kind in METRICS]


def _task(export: Export) -> str:
    return type(export.run.data).__name__


def _datasets(export: Export) -> list[str] | None:
    """The hub's id of the data, where the run took it from there."""
    path = getattr(getattr(export.run.data, "source", None), "path", None)
    local = any((getattr(export.run.data, "files", None) or {}).values())
    return [path] if isinstance(path, str) and not local else None


def _sentence(export: Export) -> str:
    step = export.about["step"]
    trained = "" if step is None else f", {export.about['checkpoint']} checkpoint, after {step} steps"
    return f"What `{export.run.method_name}` has found for the frozen `{export.base.title}`{trained}."


def _base(export: Export) -> str:
    """Where the base model comes from, where that is not its hub id."""
    base = export.base
    name, embedded = base.config.name, EMBEDDED.get(base.config.name)
    if embedded is None:
        if not base.public or base.location is None or base.hub_id:
            return ""
        return f"The base model is a folder, called `{base.shown}` here; put its path in the place of that name.\n\n"
    instead = f"; put that in the place of `{base.shown}`" if base.public else ""
    command = f"from lightning_prompts.lm.embedded import embedded_folder; print(embedded_folder('{name}'))"
    return (
        f"The base model is `{embedded.origin}` as the package `{' '.join(embedded.packages)}` has it: quantised to 4 "
        "bits and de-quantised, which makes it another model than that on the hub, and scores differ with that one. "
        "This command writes it on any machine and prints its folder "
        f'(after `{embedded.install}`){instead}:\n\n```bash\npython -c "{command}"\n'
        "```\n\n"
    )


def _text(export: Export) -> str:
    """What stands around the prompt."""
    about = export.about
    told = [f"Template: {_code(text)}\n" for text in about["prompts"][-1]["templates"].values()]
    if about["chat"]:
        told.append(
            "The text up to `{answer}` is the user's turn of a chat, rendered by the tokenizer's chat template.\n"
        )
    told.append(f"{about['position'][:1].upper()}{about['position'][1:]}.\n")
    if about["folded"]:
        told.append(
            f"The first {about['folded']} virtual tokens are the text in front of `{{prompt}}`, "
            f"{_code(about['folded_text'])}, "
            "so leave that out of the text.\n"
        )
    if about["lead"] and not about["chat"] and export.kind != "text":
        where = "is folded in, so no other may be put" if about["folded"] else "comes first"
        told.append(f"What the tokenizer starts a sequence with (token {about['lead']}) {where} before the text.\n")
    if labels := export.examples[0].labels:
        names = ", ".join(_code(names[0]) for names in labels)
        calibrated = (
            ", less what the model says without a question" if export.run.method.lm_config.calibrate_labels else ""
        )
        told.append(
            f"The answer is a class ({names}): the likeliest one, over all ways to write it{calibrated}. "
            "Where classes begin alike, what ends an answer is scored with them. Nothing is generated.\n"
        )
    else:
        told.append(f"A generated answer ends at the first match of {_code(about['stop'])}.\n")
    return "\n".join(told)


def _code(text: str) -> str:
    """As code on one line, whatever is in it."""
    text = json.dumps(text, ensure_ascii=False)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "The run has no `metrics.json`: it was not tested.\n\n"
    names = list(dict.fromkeys(kind for _, kind, _ in _rows(metrics)))
    lines = [f"| test set | {' | '.join(METRICS[kind] for kind in names)} |", f"|---|{'---|' * len(names)}"]
    for split in dict.fromkeys(split for split, _, _ in _rows(metrics)):
        found = {kind: value for own, kind, value in _rows(metrics) if own == split}
        lines.append(f"| {split} | {' | '.join(f'{found[kind]:.4f}' if kind in found else '' for kind in names)} |")
    return "\n".join(lines) + "\n\nBy the run's last `test` (`metrics.json`).\n\n"


def _checked(differences: list[float]) -> str:
    return (
        f"Checked on export: through these files, read back from disk, {len(differences)} test examples "
        "have the run's own "
        f"NLL in float32 to {max(differences):.1e} nats per token.\n"
    )


def _config(export: Export) -> str:
    """The essentials of the config."""
    config = export.run.config or {}
    trainer = config.get("trainer") or {}
    kept: dict[str, Any] = {name: config[name] for name in ("seed_everything", "model", "data") if name in config}
    kept["trainer"] = {name: trainer[name] for name in ("max_steps", "max_epochs", "precision") if name in trainer}
    told = ""
    if export.base.public:
        kept, told = without_places(kept), f"Local paths and addresses of servers are {LEFT_OUT[1:-1]}. "
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}\n\n{told}`{ABOUT}` has the rest for programs.\n"
