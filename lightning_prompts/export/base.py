"""The base model of an export, as other programs load it, and names of places, which a public export leaves out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_prompts.errors import UserError
from lightning_prompts.lm import LMConfig
from lightning_prompts.lm.embedded import EMBEDDED, embedded_folder
from lightning_prompts.lm.loading import RANDOM, load_model

LEFT_OUT = "(left out)"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class BaseModel:
    """A base model under the name that transformers loads.

    Attributes:
        config: Settings of the model in the run, in float32.
        location: Folder or hub id; ``None`` for random weights, which are in no folder.
        hub_id: Hub id of the model, or of the model that it was made from; ``None`` without one.
        folder: Folder to write the model to; ``None`` for none.
        public: Whether the export is uploaded, so that its files must not contain local paths.
    """

    config: LMConfig
    location: str | None
    hub_id: str | None
    folder: Path | None = None
    public: bool = False

    @property
    def title(self) -> str:
        """Name of the model for readers."""
        name = self.config.name
        if not self.public:
            return name
        return Path(name).resolve().name if Path(name).is_dir() else str(without_places(name))

    @property
    def shown(self) -> str:
        """Name of the model in files, for programs to load; a public export has only the last part of a local path."""
        if not self.public or self.location is None:
            return self.location or self.title
        return self.hub_id or Path(self.location).name

    def named(self, what: str) -> str:
        """Return the name of the model in files, for a format that needs a location.

        Args:
            what: Name of the format in messages.

        Raises:
            UserError: The model has no location.
        """
        if self.location is None:
            raise UserError(
                f"{what} refers to the folder of its model, but {self.config.name!r} has random weights and no folder; "
                "use --base FOLDER to write them to a folder"
            )
        return self.shown

    def write(self) -> None:
        """Write the untrained model without quantisation to its folder, unless the folder contains a model.

        Raises:
            UserError: The folder contains something else.
        """
        if self.folder is None or (self.folder / "config.json").is_file():
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"--base {self.folder} already exists and contains no model; use another folder")
        model, tokenizer = load_model(self.config)
        model.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)

    @property
    def revision(self) -> str | None:
        """Revision of a hub model; ``None`` for a folder."""
        return self.config.revision if self.location == self.config.name else None

    @property
    def attention(self) -> str | None:
        """``eager`` for models with capped attention scores, which faster implementations ignore; else ``None``."""
        if self.location is None:
            return None
        found = AutoConfig.from_pretrained(self.location, revision=self.revision, trust_remote_code=False)
        return "eager" if getattr(found.get_text_config(), "attn_logit_softcapping", None) else None

    def load(self) -> PreTrainedModel:
        """Load the model in float32 on the CPU, with the attention of transformers unless its weights are random."""
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
    """Describe the base model of a run, without writing it.

    Args:
        config: Settings of the model in the run.
        folder: Folder to write the model to; ``None`` to use it where it is.
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


def without_places(value: Any) -> Any:  # noqa: ANN401 - YAML
    """Remove local paths and addresses of servers from a part of a config.

    >>> without_places({"files": ["/home/me/rows.csv"], "server": {"base_url": "http://host/v1", "chat": True}})
    {'files': ['(left out)'], 'server': {'base_url': '(left out)', 'chat': True}}
    >>> without_places(["/no_think", "a/b", "random:llama,hidden_size=64", "random:/home/me/model,num_layers=2", ""])
    ['/no_think', 'a/b', 'random:llama,hidden_size=64', '(left out)', '']
    """
    if isinstance(value, Mapping):
        return {name: LEFT_OUT if name == "base_url" else without_places(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    return LEFT_OUT if isinstance(value, str) and _is_place(value) else value


def _is_place(text: str) -> bool:
    """Whether a text is an absolute path, or the path of an existing file."""
    path = text.removeprefix(RANDOM).partition(",")[0] if text.startswith(RANDOM) else text
    if not path.strip() or "\n" in path:
        return False
    deep = PurePosixPath(path).is_absolute() and len(PurePosixPath(path).parts) > 2
    if deep or path.startswith(("~/", "file:")) or PureWindowsPath(path).is_absolute():
        return True
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with invalid characters
        return False
