"""Keeps loaded LMs, so that runs in one process load each LM once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_prompts.lm.config import LMConfig
from lightning_prompts.lm.frozen import FrozenLM

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Key = tuple[LMConfig, torch.device]


class KeptLMs:
    """LMs that earlier runs loaded, by config and device.

    Attributes:
        lms: Each LM with its state just after loading, see `_state`.
        used: The LMs that the present run asked for, see `one_run`.
    """

    def __init__(self) -> None:
        """Keep no LM yet."""
        self.lms: dict[Key, tuple[FrozenLM, object]] = {}
        self.used: set[Key] = set()

    def get(self, config: LMConfig, device: torch.device) -> FrozenLM:
        """A `FrozenLM` in the state of a fresh load. The one from the previous call with this config stops working.

        Only the weights and the tokenizer are shared with it; usage counts, CUDA graphs, compiled layers and hooks are
        not. If somebody changed the model (added adapters or hooks, or made it trainable), it is loaded again.
        """
        key = (config, device)
        self.used.add(key)
        old, state = self.lms.pop(key, (None, None))
        if old is None or _state(old.model) != state:
            if old is not None:
                old.cpu()  # somebody may still hold it
                del old
            self.make_room(device)
            lm = FrozenLM.load(config, device=device)
        else:
            lm = old.renewed(config).to(device)  # see `make_room`
        self.lms[key] = (lm, _state(lm.model))
        return lm

    def make_room(self, device: torch.device) -> None:
        """Move the LMs that the present run did not ask for from a device to the CPU."""
        for key, (lm, _) in self.lms.items():
            if key[1] == device and key not in self.used:
                lm.cpu()

    @contextmanager
    def one_run(self) -> Iterator[None]:
        """Inside is one run. After it, free the LMs that it did not ask for, unless it failed."""
        self.used = set()
        yield
        if unused := self.lms.keys() - self.used:
            for key in unused:
                del self.lms[key]
            gc.collect()  # a model and its hooks refer to each other

    def free(self) -> None:
        """Free all LMs, and the memory that PyTorch reserved for them."""
        self.lms.clear()
        gc.collect()
        torch.cuda.empty_cache()


_kept: ContextVar[KeptLMs | None] = ContextVar("kept_lms", default=None)


@contextmanager
def keep_lms(lms: KeptLMs | None = None) -> Iterator[KeptLMs]:
    """Inside, `load_or_reuse` loads each LM once. Nested blocks share the LMs of the outermost one.

    Args:
        lms: LMs that an earlier block kept, and that stay after this one; by default none.
    """
    outer = _kept.get()
    kept = outer or (KeptLMs() if lms is None else lms)
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)
        if outer is None and lms is None:
            kept.free()


@contextmanager
def stay() -> Iterator[None]:
    """Inside, the kept LMs stay on their devices, whatever moves the method that uses them."""
    kept = _kept.get()
    lms = [] if kept is None else [lm for lm, _ in kept.lms.values()]
    for lm in lms:
        lm.stays = True
    try:
        yield
    finally:
        for lm in lms:
            lm.stays = False


def make_room(device: torch.device) -> None:
    """See `KeptLMs.make_room`; nothing happens outside of `keep_lms`."""
    if (kept := _kept.get()) is not None:
        kept.make_room(device)


def load_or_reuse(config: LMConfig, device: torch.device) -> FrozenLM:
    """`FrozenLM.load`, or inside of `keep_lms` an LM that was loaded before, with the same results to the digit.

    Quantised models are always loaded: bitsandbytes changes weights when they move between devices.

    Args:
        config: Which LM.
        device: Where the run computes.

    Raises:
        UserError: See `FrozenLM.load`.
    """
    kept = _kept.get()
    if kept is None or config.quantization not in (None, "none"):
        make_room(device)
        return FrozenLM.load(config, device=device)
    return kept.get(config, device)


def _state(model: PreTrainedModel) -> object:
    """What changes if somebody adds modules or hooks to a model, or makes it trainable."""
    modules: list[Any] = [
        (name, type(module), *(len(getattr(module, hooks)) for hooks in HOOKS))
        for name, module in model.named_modules()
    ]
    return modules, [(name, parameter.requires_grad, parameter.dtype) for name, parameter in model.named_parameters()]
