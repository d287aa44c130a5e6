"""Code blocks of docs/recipes.md and CONTRIBUTING.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

from support.models import SMALLEST
from support.project import ROOT

SMALL = [
    "--model.lm.name",
    f"{SMALLEST},max_position_embeddings=2048",
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
]


@dataclass(frozen=True)
class Block:
    """A piece of code in a page: its language, its text, and the file that its first line names."""

    language: str
    text: str

    @property
    def file(self) -> str:
        match = re.match(r"# (?:add to )?([\w/.]+\.(?:py|yaml))\n", self.text)
        return match[1] if match else ""

    @property
    def added(self) -> bool:
        return self.text.startswith("# add to ")

    @property
    def commands(self) -> list[str]:
        """The lines of a shell script, continued ones joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line and not line.startswith("#")]


def section(page: str, heading: str) -> list[Block]:
    """The blocks between a heading and the next of its kind."""
    text = (ROOT / page).read_text(encoding="utf-8")
    body = text.partition(f"\n{heading}\n")[2]
    assert body, f"{page} has no section {heading!r}"
    masked = re.sub(r"```.*?```", _masked, body, flags=re.S)
    body = re.split(rf"\n#{{1,{heading.count('#')}}} ", masked)[0].replace("\x00", "#")
    return [Block(language, code) for language, code in re.findall(r"```(\w+)\n(.*?)```", body, re.S)]


def _masked(match: re.Match[str]) -> str:
    return match[0].replace("#", "\x00")  # a comment in code is no heading
