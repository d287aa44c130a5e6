"""The pretend device is there for the tests of this folder, and for no others."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from lightning_prompts.objectives import bertscore, rewards
from support.pretend_device import installed, register
from support.runs import Fit, Run, train

register()  # while tests are collected, ahead of other tests' backward passes


@pytest.fixture(scope="package", autouse=True)
def _device() -> Iterator[None]:
    with installed():
        yield
    for loaded in (bertscore._load, rewards._bert_scorer):  # scorers that other tests would find on the device
        loaded.cache_clear()


@pytest.fixture(scope="package")
def fitted(_device: None, tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A training of a method on a device; each is done once."""

    @functools.cache
    def fit(name: str, device: str, dtype: str = "float32") -> Run:
        return train(name, device, tmp_path_factory.mktemp("run"), dtype)

    return fit
