"""Rows from the model hub's datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from huggingface_hub import HfApi

from lightning_prompts.datamodules.base import Split
from lightning_prompts.errors import UserError


@dataclass(frozen=True)
class HubSource:
    """Where a dataset lies on the hub.

    Attributes:
        path: Its id.
        config: Its configuration.
        splits: What its splits are called, for ``train`` and perhaps ``val`` and ``test``.
    """

    path: str
    config: str | None
    splits: Mapping[Split, str]


def hub_rows(
    path: str,
    config: str | None,
    split: str,
    files_option: str,
    wanted: Callable[[Mapping[str, Any]], bool] = lambda row: True,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of a dataset, streamed, so that no more is downloaded than is read.

    Args:
        path: The dataset's id on the hub.
        config: Its configuration, if it has several.
        split: Its split.
        files_option: The option that names local files instead, for the error message.
        wanted: Which rows to keep.
        limit: Stop after so many kept rows.

    Raises:
        UserError: It is not to be had.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    try:
        HfApi().dataset_info(path, timeout=10)  # or else every file would be asked for again and again
        stream: Iterable[dict[str, Any]] = datasets.load_dataset(path, config, split=split, streaming=True)
        return list(islice((row for row in stream if wanted(row)), limit))
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"dataset {path!r} ({split}) is not to be had from the hub ({type(error).__name__}: {reason}); without a "
            f"network, give local files: --{files_option} FILE"
        ) from error
