"""Initialise prompts from a PEFT adapter. The files are read as data, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, KeyValues
from lightning_prompts.prompts.initializers import Initializer

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ABOUT = "prompt.json"  # metadata in exports of this project
PROMPT_TUNING, PREFIX_TUNING, LORA = "PROMPT_TUNING", "PREFIX_TUNING", "LORA"
# Settings that make an adapter something other than a plain LoRA.
VARIANTS = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
# Initialisations that keep the weights of the model. The others (PiSSA, OLoRA, CorDA, LoftQ, ...) subtract the initial
# update from the weights, and PEFT does so again when it loads the adapter.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class FromPeft(Initializer):
    """Start from a PEFT adapter: a soft prompt of prompt tuning, a prefix of prefix tuning, or a LoRA.

    A prefix can also start from a soft prompt, as from any vectors. Every command on the run, including ``test``, reads
    the folder again, so keep it. Only safetensors are supported.

    Attributes:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """

    folder: str

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`.

        Raises:
            UserError: The folder contains no adapter, or the adapter has another type, model or length.
        """
        return self._vectors(lm, length, self.read(PROMPT_TUNING)[1])

    def key_values(self, lm: FrozenLM, length: int) -> KeyValues:
        """See `Initializer` and `__call__`."""
        config, tensors = self.read(PREFIX_TUNING, PROMPT_TUNING)
        if config["peft_type"] == PROMPT_TUNING:
            return lm.key_values(self._vectors(lm, length, tensors))
        flat = self._prompt(tensors)
        widths = lm.key_values(torch.zeros(1, lm.width, device=lm.device)).widths
        self._check_shape(lm, "W", flat, length, sum(shape.numel() for pair in widths for shape in pair))
        return KeyValues.unflatten(flat.to(lm.device), widths)

    def _vectors(self, lm: FrozenLM, length: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors ``[P, D]`` without template tokens that an export of this project has folded in."""
        vectors = self._prompt(tensors)[self._folded() :]
        self._check_shape(lm, "D", vectors, length, lm.width)
        return vectors.to(lm.device)

    def updates(self, like: Mapping[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
        """Read the updates of a LoRA.

        Args:
            like: The expected tensors by their names in PEFT.
            rank: Expected rank of the updates.
            alpha: Expected scale of the updates times the rank.

        Returns:
            The tensors of the adapter by the same names, float32.

        Raises:
            UserError: See `__call__`; or the adapter has another rank, another scale or other layers.
        """
        config, tensors = self.read(LORA)
        for name, setting, mine in (("r", "rank", rank), ("lora_alpha", "alpha", alpha)):
            if config.get(name) != mine:
                raise UserError(
                    f"adapter {self.folder} has {setting} {config.get(name)}, not {mine}; set model.{setting} to it"
                )
        odd = [name for name in VARIANTS if config.get(name)]
        if odd:
            raise UserError(f"adapter {self.folder} sets {odd[0]}, which LoraTuning does not support; use a plain LoRA")
        start = config.get("init_lora_weights")
        if start not in STARTS:
            raise UserError(
                f"adapter {self.folder} was initialised with init_lora_weights {start!r}, which changes the weights of "
                "the model; save it as a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
            )
        if set(tensors) != set(like):
            name = min(set(tensors) ^ set(like))
            where = "lacks" if name in like else "has"
            raise UserError(
                f"adapter {self.folder} {where} {name}, because its layers differ from this run's; set "
                f"model.target_modules to those of the adapter ({config.get('target_modules')})"
            )
        for name, value in tensors.items():
            if value.shape != like[name].shape:
                raise UserError(
                    f"adapter {self.folder} is for another model: its {name} has shape {list(value.shape)}, expected "
                    f"{list(like[name].shape)}"
                )
        return {name: value.float() for name, value in tensors.items()}

    def read(self, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read the configuration and the tensors of the adapter.

        Args:
            kinds: The supported types of adapters, as PEFT names them.

        Raises:
            UserError: See `__call__`.
        """
        folder = Path(self.folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} contains no PEFT adapter: {CONFIG} is missing")
        config = _json(folder / CONFIG)
        kind = config.get("peft_type")
        if kind not in kinds:
            raise UserError(f"adapter {folder} has type {kind}, expected {' or '.join(kinds)}")
        if not (folder / TENSORS).is_file():
            hint = (
                f": {PICKLED} may contain code and is not read; save the adapter as safetensors"
                if (folder / PICKLED).exists()
                else ""
            )
            raise UserError(f"adapter {folder} has no {TENSORS}{hint}")
        try:
            tensors = load_file(folder / TENSORS)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"adapter {folder}: {TENSORS} is damaged ({' '.join(str(error).split())[:100]})") from error
        if bad := [name for name, value in tensors.items() if not torch.isfinite(value.float()).all()]:
            raise UserError(f"adapter {folder}: {bad[0]} has values that are not finite")
        return config, tensors

    def _prompt(self, tensors: Mapping[str, Tensor]) -> Tensor:
        if set(tensors) != {"prompt_embeddings"} or tensors["prompt_embeddings"].dim() != 2:
            raise UserError(
                f"adapter {self.folder} contains {', '.join(sorted(tensors)) or 'nothing'}, not prompt_embeddings"
            )
        return tensors["prompt_embeddings"].float()

    def _folded(self) -> int:
        path = Path(self.folder) / ABOUT
        count = _json(path).get("folded", 0) if path.is_file() else 0
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: folded must be a number of tokens, at least 0, got {count!r}")
        return count

    def _check_shape(self, lm: FrozenLM, letter: str, found: Tensor, length: int, width: int) -> None:
        if found.shape[1] != width:
            raise UserError(
                f"adapter {self.folder} is for another model: its width ({letter}) is {found.shape[1]}, but that of "
                f"{lm.name} is {width}"
            )
        if len(found) != length:
            raise UserError(f"adapter {self.folder} has length {len(found)}, not {length}; set model.length to it")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {' '.join(str(error).split())[:100]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not contain a JSON object")
    return found
