"""The language models of a method, loaded onto the devices of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import lightning as L
import torch

from lightning_prompts.errors import UserError
from lightning_prompts.lm import FrozenLM, LanguageModel, LMConfig, RemoteLM, Usage
from lightning_prompts.lm.precision import for_device
from lightning_prompts.lm.reuse import load_or_reuse, make_room, stay

if TYPE_CHECKING:
    from typing_extensions import Self


class Loading(L.LightningModule):
    """Loads the language models of a method, and counts their use.

    Attributes:
        lm: The frozen language model, unless it is behind a server.
        lms: All language models, by their settings.
    """

    takes_server: ClassVar[bool] = False  # the method needs only texts of the LM, so the LM may be behind a server
    trains_lm: ClassVar[bool] = False  # the method trains weights instead of a prompt

    lm: FrozenLM
    lms: dict[LMConfig, LanguageModel]

    def __init__(self, lm: LMConfig) -> None:
        """Keep the settings of the LM.

        Raises:
            UserError: The LM is behind a server, and the method needs more than texts.
        """
        super().__init__()
        if lm.server is not None and not self.takes_server:
            raise UserError(
                f"{type(self).__name__} works on the LM's vectors, gradients or logits, and a server gives texts; "
                "leave out model.lm.server, or take a method of texts, such as FixedPrompt, FewShot, Ape, Gepa or "
                "DeepLanguageNetwork"
            )
        self.lm_config = lm

    @property
    def language_model(self) -> LanguageModel:
        """The frozen language model, here or behind a server."""
        return self.lms[self.lm_config]

    @property
    def usage(self) -> Usage:
        """Usage of all LMs together, by this process."""
        return sum((lm.usage for lm in self.lms.values()), Usage())

    @property
    def tokens_forwarded(self) -> int:
        """Number of tokens that this process ran through all LMs together."""
        return self.usage.tokens

    def other_lms(self) -> list[LMConfig]:
        """Return the settings of the LMs that the method uses besides ``lm_config``, each once."""
        return []

    def cpu(self) -> Self:
        """Move the method to the CPU, as a Trainer does in the end, without LMs that the next run uses again."""
        with stay():
            return super().cpu()

    def _load_lms(self) -> torch.device:
        """Load all LMs, and return the device of the run: torch's default device without a Trainer.

        Raises:
            UserError: The method does not support the run's precision or strategy; or see `load_lm`.
        """
        self._check_trainer()
        device = torch.get_default_device() if self._trainer is None else self.trainer.strategy.root_device
        with torch.device("cpu"):  # random draws and counts do not depend on the default device
            configs = dict.fromkeys([self.lm_config, *self.other_lms()])
            self.lms = {config: self.load_lm(config, device) for config in configs}
        make_room(device)
        if isinstance(self.language_model, FrozenLM):
            self.lm = self.language_model
        self.others = torch.nn.ModuleList(
            lm for config, lm in self.lms.items() if isinstance(lm, FrozenLM) and config != self.lm_config
        )
        self._check_sharding()
        return device

    def load_lm(self, config: LMConfig, device: torch.device) -> LanguageModel:
        """Load an LM onto the run's device, or split it over devices if the run's strategy requires it.

        An LM behind a server gets no request yet.

        Args:
            config: Settings of the LM.
            device: Device of the run.

        Raises:
            UserError: See `FrozenLM.load`; or the LM cannot be split.
        """
        if config.server is not None:
            return RemoteLM(config)
        mesh = None if self._trainer is None else getattr(self.trainer.strategy, "device_mesh", None)
        if mesh is None and not self.trains_lm:
            return load_or_reuse(config, device)
        make_room(device)
        if mesh is None:
            return FrozenLM.load(config, device=device)
        # The whole LM may not fit on a device, so it is split on the CPU first.
        lm = FrozenLM.load(for_device(config, device), device="cpu")
        lm.spread_over(mesh)
        return lm.to(device)

    def _check_sharding(self) -> None:
        """Raise a `UserError` if weights are sharded over processes that may call different LMs."""
        shards = [lm.shards for lm in self.lms.values() if isinstance(lm, FrozenLM) and lm.shards is not None]
        if len(self.lms) > 1 and any(each.lockstep is not None for each in shards):
            raise UserError(
                f"{type(self).__name__} asks several LMs, whose weights cannot be sharded over processes that work on "
                "different texts; set trainer.strategy.data_parallel_size to 1"
            )

    def _check_trainer(self) -> None:
        """Raise a `UserError` if the method does not support the run's precision or strategy."""
        if self._trainer is None:
            return
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(
                f"trainer.precision {self.trainer.precision!r} would change the precision of what is trained, "
                "which is float32; set model.lm.dtype for the LM's, and leave trainer.precision at 32-true"
            )
        strategy = self.trainer.strategy
        mesh = getattr(strategy, "device_mesh", None)
        servers = [config for config in (self.lm_config, *self.other_lms()) if config.server is not None]
        if mesh is not None and mesh["tensor_parallel"].size() > 1 and servers:
            raise UserError(
                f"{type(self).__name__} asks a server, and each of the processes that share an LM's heads would; set "
                "trainer.strategy.tensor_parallel_size to 1"
            )
        if mesh is not None and self.trains_lm:
            raise UserError(
                f"{type(self).__name__} trains weights of the model itself, which {type(strategy).__name__} spreads "
                "over processes; set trainer.strategy to ddp"
            )
