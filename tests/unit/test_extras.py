"""Optional packages are imported where they are used; without one, an error names the extra that installs it."""

from __future__ import annotations

import ast
import configparser
import sys
from collections.abc import Callable

import pytest
import torch
from packaging.requirements import Requirement

from lightning_prompts.errors import UserError
from lightning_prompts.export.peft_adapter import PeftAdapter
from lightning_prompts.lm import LMConfig, Server
from lightning_prompts.lm.loading import load_model
from lightning_prompts.lm.remote import RemoteLM
from lightning_prompts.methods import LoraTuning
from lightning_prompts.objectives.rewards import BertScore
from lightning_prompts.runs.on_ray import check_ray
from support.models import TINY
from support.project import ROOT, modules

EXTRAS = ("quantization", "bertscore", "lora", "export", "sweep", "remote")  # all others are for developers
IMPORTED_AS = {"bert-score": "bert_score"}


def packages(extra: str) -> set[str]:
    """What an extra installs, as Python imports it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {Requirement(line).name for line in config["options.extras_require"][extra].split()}
    return {IMPORTED_AS.get(name, name) for name in names}


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("quantization", lambda: load_model(LMConfig(TINY, quantization="nf4"), "cpu")),
        ("bertscore", lambda: BertScore(model="of its own").check(torch.device("cpu"))),
        ("lora", lambda: LoraTuning(lm=LMConfig(TINY)).configure_model()),
        ("export", lambda: PeftAdapter().check(None)),  # type: ignore[arg-type]
        ("sweep", check_ray),
        ("remote", lambda: RemoteLM(LMConfig("x", server=Server("http://localhost:8000/v1"))).connect()),
    ],
)
def test_the_error_names_the_extra(extra: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in packages(extra):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=rf"{package}.* pip install 'lightning-prompts\[{extra}\]'") as error:
                use()
            assert "\n" not in str(error.value)


def test_no_module_imports_an_optional_package_at_its_top() -> None:
    optional = {package for extra in EXTRAS for package in packages(extra)} - {"accelerate"}
    assert optional == {"bitsandbytes", "bert_score", "peft", "ray", "openai"}
    for name, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            found |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
            assert not {one.split(".")[0] for one in found} & optional, name
