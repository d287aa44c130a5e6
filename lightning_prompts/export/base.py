"""The model that an export goes with, as other programs load it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_prompts.errors import UserError
from lightning_prompts.export.public import without_places
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.embedded import EMBEDDED, embedded_folder
from lightning_prompts.lm.loading import RANDOM, load_model

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class BaseModel:
    """A model by the name that transformers takes.

    Attributes:
        config: What the run's config says of it, in float32.
        location: A folder or a hub id; ``None`` for random weights, which lie nowhere.
        hub_id: Its id on the hub, or that of the model that it was made from; ``None`` without one.
        folder: Where it is to be written; ``None`` for nowhere.
        public: Whether what is written about it goes to others, who are told no local path.
    """

    config: LMConfig
    location: str | None
    hub_id: str | None
    folder: Path | None = None
    public: bool = False

    @property
    def title(self) -> str:
        """What people call it."""
        name = self.config.name
        if not self.public:
            return name
        return Path(name).resolve().name if Path(name).is_dir() else str(without_places(name))

    @property
    def shown(self) -> str:
        """What files call it, for programs to load; a folder that is not to be told of is called by its last part."""
        if not self.public or self.location is None:
            return self.location or self.title
        return self.hub_id or Path(self.location).name

    def named(self, what: str) -> str:
        """What files call it, for a format that needs a location.

        Raises:
            UserError: There is none.
        """
        if self.location is None:
            raise UserError(
                f"{what} names the folder of its model, and {self.config.name!r} has random weights, which lie in "
                "none; give --base FOLDER to have them written there"
            )
        return self.shown

    def write(self) -> None:
        """Write it, de-quantised and untrained, where it is to be; a model that is there already is used.

        Raises:
            UserError: The folder holds something else.
        """
        if self.folder is None or (self.folder / "config.json").is_file():
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--base {self.folder} is there already and holds no model; give another folder")
        model, tokenizer = load_model(self.config)
        model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)

    @property
    def revision(self) -> str | None:
        """The revision of a hub model; none of a folder."""
        return self.config.revision if self.location == self.config.name else None

    @property
    def attention(self) -> str | None:
        """``eager`` for models that cap their attention scores, which the faster kinds leave out; else ``None``."""
        if self.location is None:
            return None
        found = AutoConfig.from_pretrained(self.location, revision=self.revision, trust_remote_code=False)
        return "eager" if getattr(found.get_text_config(), "attn_logit_softcapping", None) else None

    def load(self) -> PreTrainedModel:
        """The model in float32 on the CPU, with transformers' own attention where it can be loaded without ours."""
        if self.location is None:
            return load_model(self.config)[0]
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self.location,
            dtype=torch.float32,
            revision=self.revision,
            attn_implementation=self.attention,
            trust_remote_code=False,
        )
        model.eval()
        return model


def base_of(config: LMConfig, folder: Path | None, public: bool = False) -> BaseModel:
    """The model of a run; nothing is written yet.

    Args:
        config: What the run's config says of it.
        folder: Where to write it; ``None`` leaves it where it is.
        public: See `BaseModel`.
    """
    config = replace(config, dtype="float32", quantization=None, gradient_checkpointing=False)
    location: str | None = config.name
    hub_id = config.name if HUB_ID.fullmatch(config.name) and not Path(config.name).exists() else None
    if config.name in EMBEDDED:
        hub_id = EMBEDDED[config.name].origin
        location = str(embedded_folder(config.name)) if folder is None else None
    elif config.name.startswith(RANDOM):
        location = hub_id = None
    elif Path(config.name).is_dir():
        location = str(Path(config.name).resolve())
    return BaseModel(config, location if folder is None else str(folder.resolve()), hub_id, folder, public)
