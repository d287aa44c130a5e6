"""``lightning-prompts export RUN --format ...``: write an export, read it back, and keep it if its scores match."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_prompts import __version__
from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError, check_finite
from lightning_prompts.export.base import base_of, without_places
from lightning_prompts.export.card import card
from lightning_prompts.export.contents import Updates, content_of, kind_of
from lightning_prompts.export.formats import Export, Format
from lightning_prompts.export.hub import check_repo, check_token, push
from lightning_prompts.export.peft_adapter import PeftAdapter
from lightning_prompts.export.plain_text import PlainText
from lightning_prompts.export.run import open_run
from lightning_prompts.export.tensors import NumPyFiles, SafetensorsFile, position
from lightning_prompts.export.texts import Step, templates_of
from lightning_prompts.export.vllm import Vllm
from lightning_prompts.files import no_room
from lightning_prompts.prompts.from_peft import ABOUT
from lightning_prompts.types import Example

TOLERANCE = 1e-4  # nats per answer token
FORMATS: dict[str, Format] = {
    one.name: one for one in (PeftAdapter(), SafetensorsFile(), NumPyFiles(), PlainText(), Vllm())
}


def parser() -> CommandParser:
    """Make the parser of the command's arguments."""
    made = CommandParser(
        "lightning-prompts export", description="Export the result of a run for other programs, and check the files."
    )
    made.add_argument("run", type=Path, help="the run folder: config.yaml and checkpoints/")
    made.add_argument("--format", required=True, choices=FORMATS, help="the format of the export")
    made.add_argument("--out", type=Path, help="the folder to write; default: RUN/export/FORMAT")
    made.add_argument("--checkpoint", choices=("best", "last"), default="best", help="the checkpoint; default: best")
    made.add_argument("--examples", type=int, default=8, help="number of test examples for the check; default: 8")
    made.add_argument("--base", type=Path, help="also write the base model to this folder, and refer to it")
    made.add_argument("--overwrite", action="store_true", help="replace an existing export")
    made.add_argument(
        "--push",
        metavar="REPO",
        help="upload the folder to the Hugging Face hub as name/repo, without local paths and servers",
    )
    made.add_argument(
        "--private",
        action="store_true",
        help="with --push: make a new repository private; default: the setting of your account, usually public",
    )
    return made


def main(args: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: Arguments of the command.

    Returns:
        The exit code.

    Raises:
        UserError: The format does not support the result of the run, scores differ, or a file is missing.
    """
    given = parser().parse_args(args)
    check_finite("--examples", given.examples, 1)
    if given.push is not None:
        check_repo(given.push)
        check_token()
    elif given.private:
        raise UserError("--private needs a repository on the hub; set it with --push")
    made = FORMATS[given.format]
    out = given.out or given.run / "export" / made.name
    _check_out(out, given.overwrite)
    run = open_run(given.run, given.checkpoint)
    kind = kind_of(run.method)
    made.check_kind(run.method_name, kind)
    base = base_of(run.method.lm_config, given.base, public=bool(given.push))
    if isinstance(made, PeftAdapter | Vllm):
        base.named(f"--format {made.name}")
    run.restore()
    export = Export(run, kind, content_of(run.method, kind), base, run.examples()[: given.examples], {})
    export = replace(export, about=_about(export, made, given.checkpoint))
    made.check(export)
    base.write()
    differences = write_checked(export, made, out)
    print(
        f"{out}: {made.title}; {len(differences)} test examples score the same to {max(differences):.1e} nats per token"
    )
    if given.push:
        print("the export contains no local paths and no addresses of servers")
        print(f"uploaded to {push(out, given.push, given.private)}")
    return 0


def write_checked(export: Export, made: Format, out: Path) -> list[float]:
    """Write a complete and checked folder, or nothing.

    Args:
        export: The export.
        made: The format.
        out: The folder.

    Returns:
        The difference of the NLL of each example, in nats per answer token.

    Raises:
        UserError: A difference exceeds `TOLERANCE`, or the folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            (work / ABOUT).write_text(json.dumps(export.about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            made.write(export, work)
            differences = compare(export.our_nll(), made.nll(export, work))
            (work / "README.md").write_text(card(export, made, out.name, differences), encoding="utf-8")
            for path in (work, *work.iterdir()):
                path.chmod(0o755 if path.is_dir() else 0o644)
            old = Path(f"{work}.old")  # so that a complete export exists, even if this is interrupted
            if out.exists():
                out.rename(old)
            work.rename(out)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise no_room(error) or UserError(f"cannot write {out}: {error.strerror or error}") from error
    return differences


def compare(ours: Sequence[float], exported: Sequence[float]) -> list[float]:
    """Compute the absolute difference of each score.

    Raises:
        UserError: A difference exceeds `TOLERANCE`.
    """
    differences = [abs(mine - theirs) for mine, theirs in zip(ours, exported, strict=True)]
    # NaN counts as the largest difference.
    worst = max(range(len(ours)), key=lambda index: (math.isnan(differences[index]), differences[index]))
    if not differences[worst] <= TOLERANCE:
        raise UserError(
            f"nothing was written: with the exported files, test example {worst + 1} has NLL {exported[worst]:.5f}, "
            f"but with the run {ours[worst]:.5f}; they may differ by {TOLERANCE:g}"
        )
    return differences


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise a `UserError` if the folder exists and must not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / ABOUT).is_file():
        raise UserError(f"{out} already exists and is not an export; use another --out")
    if not overwrite:
        raise UserError(f"{out} already exists; use another --out, or replace it with --overwrite")


def _about(export: Export, made: Format, checkpoint: str) -> dict[str, Any]:
    """Make the contents of ``prompt.json``."""
    run, content = export.run, export.content
    method, data, encoder = run.method, run.data, run.method.lm.encoder
    templates = templates_of(data)
    text = content.text if isinstance(content, Updates) else ""
    steps = [Step(text, templates, method.lm.name, max_new_tokens=method.max_new_tokens)]
    if isinstance(content, list):
        steps = content
    first, base = export.examples[0], export.base
    records = [step.record() for step in steps]
    if base.public:
        for one in records:
            one["model"] = base.title if one["model"] == base.config.name else without_places(one["model"])
    before, _, after = steps[0].templates.get("", "").partition("{prompt}")
    front = export.pieces(first).before if isinstance(made, PeftAdapter) and isinstance(content, Tensor) else []
    where = "the text replaces {prompt}"
    return {
        "format": made.name,
        "made_by": f"lightning-prompts {__version__}",
        "method": run.method_name,
        "model": base.title,
        "revision": base.revision,
        "base_model": None if base.location is None else base.shown,
        "checkpoint": checkpoint if run.checkpoint else None,
        "step": run.step(),
        "prompts": records,
        "before": before,
        "after": after.rpartition("{answer}")[0],
        "chat": first.chat,
        "system": first.system,
        "stop": first.stop,
        "max_new_tokens": method.max_new_tokens,
        "bos_ids": list(encoder.bos_ids),
        "marks": encoder.marks(),
        "position": where if isinstance(content, list | Updates) else position(export),
        "folded": len(front),
        "folded_text": method.lm.text(front) if front else "",
        "example": _used(run.data, first),
    }


def _used(data: Any, example: Example) -> dict[str, str]:  # noqa: ANN401 - a datamodule, which is not imported here
    """Return the fields of an example that its template uses."""
    return {name: str(example.fields[name]) for name in data.template.fields if name in example.fields}
