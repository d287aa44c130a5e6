"""Starting from a PEFT adapter: its folder is read as data, and PEFT itself is not needed."""

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
ABOUT = "prompt.json"  # what this project's own exports say beside the files
PROMPT_TUNING, PREFIX_TUNING, LORA = "PROMPT_TUNING", "PREFIX_TUNING", "LORA"
# What makes of the same tensors something else than a plain LoRA.
VARIANTS = ("use_rslora", "use_dora", "use_qalora", "use_bdlora", "rank_pattern", "alpha_pattern", "layer_replication",
            "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config")  # fmt: skip
# Ways to start that leave the model's own weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) take what they
# start from off the weights, which PEFT does again when it loads such an adapter.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class FromPeft(Initializer):
    """What a PEFT adapter has learned: soft prompts of prompt tuning, prefixes of prefix tuning, LoRA's updates.

    A prefix can start from a soft prompt, too, as it can from any vectors. The folder is read again whenever the run is
    put together, by ``test`` as well, so keep it. Only safetensors are read.

    Attributes:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
    """

    folder: str

    def __call__(self, lm: FrozenLM, length: int) -> Tensor:
        """See `Initializer`.

        Raises:
            UserError: The folder is none of an adapter, or the adapter is of another kind, model or length.
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
        """``[P, D]``; without the tokens that an export of this project has put in front, as templates have them."""
        vectors = self._prompt(tensors)[self._folded() :]
        self._check_shape(lm, "D", vectors, length, lm.width)
        return vectors.to(lm.device)

    def updates(self, like: Mapping[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
        """LoRA's updates.

        Args:
            like: By PEFT's names, what there must be.
            rank: Of the updates.
            alpha: Their scale, times the rank.

        Returns:
            The adapter's tensors by the same names, float32.

        Raises:
            UserError: See `__call__`; or the adapter has another rank, scale or other layers.
        """
        config, tensors = self.read(LORA)
        for name, setting, mine in (("r", "rank", rank), ("lora_alpha", "alpha", alpha)):
            if config.get(name) != mine:
                raise UserError(
                    f"adapter {self.folder} has {setting} {config.get(name)}, not {mine}; set model.{setting} to it"
                )
        odd = [name for name in VARIANTS if config.get(name)]
        if odd:
            raise UserError(
                f"adapter {self.folder} has {odd[0]} set, which LoraTuning does not know; give a plain LoRA"
            )
        start = config.get("init_lora_weights")
        if start not in STARTS:
            raise UserError(
                f"adapter {self.folder} was started with init_lora_weights {start!r}, which changes the model's own "
                "weights, too; have PEFT save it as a plain LoRA (path_initial_model_for_weight_conversion)"
            )
        if set(tensors) != set(like):
            name = min(set(tensors) ^ set(like))
            where = "lacks" if name in like else "has"
            raise UserError(
                f"adapter {self.folder} {where} {name}, for other layers than this run's; set model.target_modules to "
                f"the adapter's ({config.get('target_modules')})"
            )
        for name, value in tensors.items():
            if value.shape != like[name].shape:
                raise UserError(
                    f"adapter {self.folder} is for another model: its {name} is {list(value.shape)}, and this one's "
                    f"{list(like[name].shape)}"
                )
        return {name: value.float() for name, value in tensors.items()}

    def read(self, *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The adapter's configuration and tensors.

        Args:
            kinds: PEFT's types that will do.

        Raises:
            UserError: See `__call__`.
        """
        folder = Path(self.folder)
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is no folder of a PEFT adapter: it has no {CONFIG}")
        config = _json(folder / CONFIG)
        kind = config.get("peft_type")
        if kind not in kinds:
            raise UserError(f"adapter {folder} is of the type {kind}; here it must be {' or '.join(kinds)}")
        if not (folder / TENSORS).is_file():
            hint = (
                f": {PICKLED} may hold code and is not read; save it as safetensors"
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
                f"adapter {self.folder} holds {', '.join(sorted(tensors)) or 'nothing'}, not prompt_embeddings"
            )
        return tensors["prompt_embeddings"].float()

    def _folded(self) -> int:
        path = Path(self.folder) / ABOUT
        count = _json(path).get("folded", 0) if path.is_file() else 0
        if not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: folded must be a number of tokens, got {count!r}")
        return count

    def _check_shape(self, lm: FrozenLM, letter: str, found: Tensor, length: int, width: int) -> None:
        if found.shape[1] != width:
            raise UserError(
                f"adapter {self.folder} is for another model: its width ({letter}) is {found.shape[1]}, and that of "
                f"{lm.name} {width}"
            )
        if len(found) != length:
            raise UserError(f"adapter {self.folder} has length {len(found)}, not {length}; set model.length to it")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {' '.join(str(error).split())[:100]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found
