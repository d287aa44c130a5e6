"""Build the sdist and the wheel, install the wheel into an empty environment, and train with it in an empty folder.

    python tests/try_wheel.py

A script that is run by hand before a release, as it installs everything anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from support.models import TINY
from support.project import ROOT

FIT = f"""fit --model SoftPromptTuning --model.lm.name {TINY} --model.max_new_tokens 2 --data Addition
    --data.train_size 64 --data.val_size 8 --data.test_size 8 --trainer.max_steps 2 --trainer.accelerator cpu
    --trainer.default_root_dir run""".split()
NEEDED = (
    "lightning_prompts/py.typed",
    "lightning_prompts/datamodules/addition.py",
    "lightning_prompts/callbacks/budget.py",
    "lightning_prompts/configs/antonyms/soft_prompt.yaml",
)
NAMED = f"""fit -c antonyms/soft_prompt.yaml --model.lm.name {TINY} --model.max_new_tokens 2 --data.val_fraction 0.01
    --data.test_fraction 0.01 --data.max_train_examples 64 --trainer.max_steps 2 --trainer.accelerator cpu
    --trainer.default_root_dir named""".split()
IN_PYTHON = f"""
import lightning_prompts as lp
data = lp.QuestionAnswer.from_rows([{{"question": f"q{{n}}", "answer": f"a{{n % 3}}"}} for n in range(40)])
found = lp.compare(["static", "soft_prompt"], data, lm="{TINY}", seeds=1, max_steps=2, accelerator="cpu", folder="both")
assert not found.errors and len(found.table) == 2
print(found, found.report(), found.runs("soft_prompt")[0].export("safetensors"))
"""


def run(*words: str | Path, cwd: Path) -> None:
    """Run a command, and stop if it fails."""
    print("$", *words, flush=True)
    subprocess.run([str(word) for word in words], cwd=cwd, check=True)


def main() -> None:
    """Build into ``dist/``, look inside, install, use."""
    built = ROOT / "dist"
    shutil.rmtree(built, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", built, ROOT, cwd=folder)
        (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
        inside = zipfile.ZipFile(wheel).namelist()
        for needed in NEEDED:
            assert needed in inside, f"{needed} is missing in {wheel.name}"
        others = [member for member in inside if not member.startswith(("lightning_prompts/", "lightning_prompts-"))]
        scripts = [member for member in inside if member.startswith("lightning_prompts/configs/") and ".py" in member]
        assert not others + scripts, f"{wheel.name} has {others + scripts}"
        with tarfile.open(source) as archive:
            assert any(member.endswith("/README.md") for member in archive.getnames())
        environment, empty = folder / "environment", folder / "empty"
        empty.mkdir()
        venv.create(environment, with_pip=True)
        pip = (
            environment / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            ROOT / "constraints.txt",
        )
        run(*pip, "torch", cwd=empty)
        run(*pip, wheel, cwd=empty)
        command = environment / "bin" / "lightning-prompts"
        run(command, "--version", cwd=empty)
        run(command, "--help", cwd=empty)
        run(command, *FIT, cwd=empty)
        run(command, "test", "-c", "run/config.yaml", "--ckpt_path", "best", cwd=empty)
        run(command, "export", "run", "--format", "safetensors", cwd=empty)
        run(command, "configs", cwd=empty)
        run(command, *NAMED, cwd=empty)
        run(environment / "bin" / "python", "-c", IN_PYTHON, cwd=empty)
    print("the wheel works")


if __name__ == "__main__":
    main()
