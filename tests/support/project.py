"""Files of the project."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name != "sweep")


def modules() -> list[tuple[str, Path]]:
    files = [
        path for package in ("lightning_prompts", "datamodules", "callbacks") for path in (ROOT / package).rglob("*.py")
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    inside = [name if name.startswith("lightning_prompts") else f"lightning_prompts.{name}" for name in names]
    return list(zip(inside, files, strict=True))
