"""Makes ``datamodules/data/antonyms.tsv`` from WordNet 3.0's antonym relation.

    apt-get download wordnet-base && dpkg -x wordnet-base*.deb wordnet
    python experiments/antonyms/make_table.py wordnet/usr/share/wordnet datamodules/data/antonyms.tsv

The file formats are described in WordNet's manual pages wndb(5) and cntlist(5).
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILES = {"adj": "a", "adv": "r", "noun": "n", "verb": "v"}
WORD = re.compile(r"[a-z]{2,}")


def synsets(path: Path) -> Iterator[tuple[int, list[str], list[tuple[str, int, str, str]]]]:
    """The synsets of a data file: offset, words, and pointers as (symbol, offset, part of speech, source/target)."""
    with path.open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence, at the head of every file
                continue
            parts = line.split("|")[0].split()
            count = int(parts[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word) for word in parts[4 : 4 + 2 * count : 2]]
            start = 5 + 2 * count
            pointers = [
                (parts[i], int(parts[i + 1]), parts[i + 2], parts[i + 3])
                for i in range(start, start + 4 * int(parts[start - 1]), 4)
            ]
            yield int(parts[0]), words, pointers


def tagged_counts(path: Path) -> Counter[str]:
    """How often each word was met in the sense-tagged texts, over all its senses."""
    counts: Counter[str] = Counter()
    with path.open(encoding="ascii") as lines:
        for line in lines:
            key, _, count = line.split()
            counts[key.split("%")[0]] += int(count)
    return counts


def antonyms(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Antonym pairs of single lower-case words: (first, second, part of speech), each pair once."""
    seen = set()
    for name in FILES:
        words_at = {}
        relations = []
        for offset, words, pointers in synsets(folder / f"data.{name}"):
            words_at[offset] = words
            for symbol, target, pos, link in pointers:
                if symbol == "!" and pos == FILES[name]:
                    relations.append((words[int(link[:2], 16) - 1], target, int(link[2:], 16) - 1))
        for source, target, index in relations:
            first, second = sorted((source, words_at[target][index]))
            if WORD.fullmatch(first) and WORD.fullmatch(second) and first != second and (first, second) not in seen:
                seen.add((first, second))
                yield first, second, name


def main() -> None:
    """Write the table, most frequent pairs first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wordnet", type=Path, help="folder with data.adj and its like")
    parser.add_argument("table", type=Path, help="file to write")
    arguments = parser.parse_args()
    counts = tagged_counts(arguments.wordnet / "cntlist.rev")
    rows = [(min(counts[a], counts[b]), a, b, pos) for a, b, pos in antonyms(arguments.wordnet)]
    rows.sort(key=lambda row: (-row[0], row[1:]))
    lines = ["word\tantonym\tpart\tcount", *(f"{a}\t{b}\t{pos}\t{count}" for count, a, b, pos in rows)]
    arguments.table.write_text("\n".join(lines) + "\n", encoding="ascii")
    print(f"{len(rows)} pairs, {sum(row[0] > 0 for row in rows)} of them with both words in the tagged texts")


if __name__ == "__main__":
    main()
