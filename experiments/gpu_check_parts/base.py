"""Common code of the checks: result rows, language models, the device."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gpu_check_parts.rows import Row, Settings
from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LMConfig
from lightning_prompts.lm.embedded import find_gguf

ROOT = Path(__file__).parents[2]
PRODUCT = tuple(str(ROOT / name) for name in ("lightning_prompts", "callbacks", "datamodules"))
EMBEDDED = "smollm2-135m-instruct"

# The same shapes as in tests/conftest.py.
_SMALL = "hidden_size=32,intermediate_size=48,num_hidden_layers=3,num_attention_heads=4,num_key_value_heads=2"
SHAPES = {
    "llama": f"random:llama,{_SMALL},max_position_embeddings=256",
    "gpt2": "random:gpt2,n_embd=32,n_layer=3,n_head=4,n_positions=256",
    "qwen2": f"random:qwen2,{_SMALL},max_position_embeddings=256",
    "qwen3": f"random:qwen3,{_SMALL},head_dim=8,max_position_embeddings=256",
    "gemma3": f"random:gemma3_text,{_SMALL},head_dim=8,sliding_window=6,sliding_window_pattern=2,"
    "max_position_embeddings=256",
    "gemma2": f"random:gemma2,{_SMALL},head_dim=8,sliding_window=6,attn_logit_softcapping=0.05,"
    "max_position_embeddings=256",
    "mistral": f"random:mistral,{_SMALL},sliding_window=6,max_position_embeddings=256",
}
LARGER = (
    "random:llama,hidden_size=128,intermediate_size=256,num_hidden_layers=4,num_attention_heads=4,"
    "num_key_value_heads=2,max_position_embeddings=1024"
)


def describe_error(error: BaseException) -> str:
    """Format type and message of an error, with the last stack frame in this project."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(PRODUCT)] or list(frames)
    place = ""
    if own:
        with contextlib.suppress(ValueError):
            own[-1].filename = str(Path(own[-1].filename).relative_to(ROOT))
        place = f" ({own[-1].filename}:{own[-1].lineno} {own[-1].name})"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}"


def attempt(part: str, name: str, work: Callable[[], Row]) -> Row:
    """Run a check; turn an exception into a row."""
    start = time.perf_counter()
    try:
        row = work()
    except Exception as error:  # noqa: BLE001 - report it, and continue with other checks
        row = Row(part, name, ok=False, error=describe_error(error))
    row.seconds = time.perf_counter() - start
    return row


def compared(part: str, name: str, found: Tensor, wanted: Tensor, tolerance: float) -> Row:
    """Compare two tensors on any devices.

    If the largest number is below 1, the tolerance is relative to it.
    """
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    if found.shape != wanted.shape:
        return Row(part, name, f"shape {tuple(found.shape)}", f"shape {tuple(wanted.shape)}", ok=False)
    largest = wanted[wanted.isfinite()].abs().max().item()
    allowed = tolerance * min(1.0, largest)
    # Equal infinities differ by 0; a NaN makes the largest difference NaN.
    difference = torch.where(found == wanted, 0.0, (found - wanted).abs()).max().item()
    figures = {"difference": difference, "tolerance": allowed, "largest": largest}
    return Row(part, name, f"differs by {difference:.1e}", f"<= {allowed:.0e}", difference <= allowed, figures=figures)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Compute the norm of the difference relative to the norm of the expected tensor."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def load(name: str, device: str, **settings: Any) -> FrozenLM:
    """Load an LM onto a device."""
    return FrozenLM.load(LMConfig(name, **settings), device=device)


def twin(model: PreTrainedModel, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """Make an unchanged transformers model with the same weights."""
    some = model.get_input_embeddings().weight
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(model.config), dtype=dtype, attn_implementation=attention
    )
    plain.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    return plain.to(some.device).eval().requires_grad_(False)


def normal(lm: FrozenLM, *shape: int, seed: int = 3) -> Tensor:
    """Draw normal vectors with the scale of the embeddings, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    scale = lm.embedding_matrix().float().std().cpu()
    return torch.randn(*shape, lm.width, generator=generator, device="cpu").mul(scale).to(lm.device).requires_grad_()


# --- the device -------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def clean(device: str) -> None:
    """Free unused memory, and reset the peak memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Return the peak memory since `clean` in GiB; 0 except on CUDA."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def pretend_device() -> Any:
    """Import the pretend device of the tests, and install it for the rest of this process."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from support import pretend_device as module  # type: ignore[import-not-found]

    if not _installed:
        _installed.append(module.installed())
        _installed[0].__enter__()
    return module


_installed: list[Any] = []


@lru_cache(maxsize=1)
def prepare(device: str) -> None:
    """Prepare a process: full float32 precision, and the device."""
    from lightning_prompts.cli.terminal import quiet

    quiet()
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device == "pretend":
        pretend_device()
    if device == "cuda":
        torch.zeros(1, device="cuda")


def methods_lm(settings: Settings) -> str:
    """Return the name of the LM for the checks of methods."""
    if settings.lm is not None:
        return settings.lm
    if settings.small:
        return f"{SHAPES['llama']},max_position_embeddings=1024"
    return EMBEDDED if _embedded_is_here() else LARGER


def _embedded_is_here() -> bool:
    try:
        from lightning_prompts.lm.embedded import EMBEDDED as MODELS

        find_gguf(EMBEDDED, MODELS[EMBEDDED])
        import gguf  # noqa: F401
    except (UserError, ImportError, KeyError):
        return False
    return True
