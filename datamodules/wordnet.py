"""The shipped table of antonyms, from WordNet 3.0 (see ``data/LICENSE.wordnet``)."""

from __future__ import annotations

import csv
from importlib.resources import files


def antonym_table() -> list[dict[str, str]]:
    """The table's rows: ``word``, ``antonym``, ``part`` of speech, and ``count`` of the rarer word in tagged texts."""
    text = (files("lightning_prompts.datamodules") / "data" / "antonyms.tsv").read_text(encoding="ascii")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


def words() -> list[str]:
    """Every word of the table once, in alphabetical order: lower-case letters only."""
    return sorted({word for row in antonym_table() for word in (row["word"], row["antonym"])})
