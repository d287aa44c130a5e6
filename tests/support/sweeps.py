"""Methods for sweeps."""

from __future__ import annotations

from pathlib import Path

from support.models import SMALLEST

DATA = "data: {class_path: Antonyms, init_args: {max_train_examples: 64, val_fraction: 0.01, test_fraction: 0.01}}\n"


def write_methods(folder: Path) -> None:
    """The configs of two methods that run in a second."""
    lm = f'max_new_tokens: 2, lm: {{name: "{SMALLEST}"}}'
    (folder / "soft.yaml").write_text(
        f"model: {{class_path: SoftPromptTuning, init_args: {{length: 2, {lm}}}}}\n{DATA}trainer: {{max_steps: 2}}\n"
    )
    (folder / "few.yaml").write_text(f"model: {{class_path: FewShot, init_args: {{shots: 1, {lm}}}}}\n{DATA}")
