"""Write a document of invented facts, and questions on it: ``python make_document.py FOLDER [SEED]``.

A model cannot know the answers without the document. Each fact is asked in three ways, so that test questions ask in
other words what training questions have asked.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

FIRST = [
    *("Ada", "Bruno", "Clara", "Dario", "Edda", "Felix", "Greta", "Hugo"),
    *("Ida", "Jonas", "Klara", "Leo", "Mara", "Nils", "Olga", "Paul"),
]
LAST = ["Abel", "Brandt", "Castor", "Diehl", "Ewers", "Falk"]
PETS = ["parrot", "tortoise", "rabbit", "ferret", "goldfish", "hamster", "canary", "lizard", "spider", "cat"]
PEOPLE = 64
ASK_ROOM = ("Which room does {} work in?", "In which room can {} be found?", "What is the number of {}'s room?")
ASK_PET = ("What animal does {} keep?", "Which pet does {} have?", "What kind of animal lives with {}?")


def main(folder: Path, seed: int) -> None:
    """Write ``document.txt`` and ``questions.jsonl``."""
    draw = random.Random(seed)
    names = draw.sample([f"{first} {last}" for first in FIRST for last in LAST], PEOPLE)
    rooms = draw.sample(range(100, 400), PEOPLE)
    lines, rows = ["The people of the institute.", ""], []
    for name, room in zip(names, rooms, strict=True):
        pet = draw.choice(PETS)
        lines.append(f"{name} works in room {room} and keeps a {pet}.")
        rows += [{"question": question.format(name), "answer": str(room)} for question in ASK_ROOM]
        rows += [{"question": question.format(name), "answer": f"a {pet}"} for question in ASK_PET]
    draw.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "document.txt").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
