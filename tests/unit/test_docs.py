"""The README and the pages of docs/ name files, settings and classes that exist."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import Counter
from pydoc import locate

import pytest

from lightning_prompts import callbacks, datamodules, methods
from lightning_prompts.lm import LMConfig
from support.project import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"--(model|data|budget|checkpoint)\.(\w+)(?:\.(\w+))?")


def parameters(*classes: type) -> set[str]:
    """The names of the settings of classes."""
    bases = {base for one in classes for base in one.__mro__}  # a class may forward settings to its base
    return {name for base in bases if "__init__" in vars(base) for name in inspect.signature(base.__init__).parameters}


SETTINGS = {
    "model": parameters(*(getattr(methods, name) for name in methods.__all__)),
    "data": parameters(*(getattr(datamodules, name) for name in datamodules.__all__)),
    "budget": parameters(callbacks.Budget),
    "checkpoint": parameters(callbacks.LastCheckpoint),
}
LM_SETTINGS = {field.name for field in dataclasses.fields(LMConfig)}


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1500


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        content = target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
        if included := re.match(r'--8<-- "(.*)"', content):
            content = (ROOT / included[1]).read_text(encoding="utf-8")
        assert not anchor or anchor in slugs(content), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_settings_files_and_classes_exist(page) -> None:
    text = page.read_text(encoding="utf-8")
    for group, name, inner in OPTION.findall(text):
        assert name in SETTINGS[group] or name == "help", f"--{group}.{name}"
        if name in ("lm", "proposer") and group == "model":
            assert inner in {*LM_SETTINGS, ""}, f"--model.{name}.{inner}"
    for path in re.findall(r"\bexperiments/[\w/]+\.(?:yaml|py|md)", text):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"^::: (\S+)", text, re.M):
        assert locate(target) is not None, target


def test_every_public_class_has_its_settings_on_a_page() -> None:
    shown = {target for page in PAGES for target in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)}
    for package in (methods, datamodules, callbacks):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= shown


def test_an_object_is_described_on_one_page() -> None:
    # Two pages with one object give it two addresses, which the strict build refuses.
    described = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)]
    assert [name for name, times in Counter(described).items() if times > 1] == []
