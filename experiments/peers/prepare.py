"""Write train.csv, val.csv, test.csv and the language model into a folder: python experiments/peers/prepare.py FOLDER

The other scripts of this folder do the same job in different libraries, each as its user would write it: read the CSV
files, compare prompts on the test questions, export the best one, and answer two new questions. They run in FOLDER.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd

from lightning_prompts import QuestionAnswer
from lightning_prompts.datamodules.sources import shipped_table
from lightning_prompts.lm.embedded import embedded_folder

SIZES = {"val": 20, "test": 50}


def main(folder: Path) -> None:
    """Split 700 pairs of antonyms, in both directions, so that no word of a test pair is in training."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(row["word"], row["antonym"]) for row in shipped_table("antonyms.tsv")[:700]]
    rows = [{"question": one, "answer": other} for pair in pairs for one, other in (pair, pair[::-1])]
    data = QuestionAnswer.from_rows(rows, disjoint="words", val_size=SIZES["val"], test_size=SIZES["test"])
    for split in ("train", "val", "test"):
        table = [
            {"question": one.question, "answer": one.reference}
            for one in data.examples(split)
            if {one.question, one.reference} != {"question", "answer"}  # a pair that reads like the header
        ]
        pd.DataFrame(table).to_csv(folder / f"{split}.csv", index=False)
        print(f"{split}.csv: {len(table)} rows")
    shutil.copytree(embedded_folder("smollm2-135m-instruct"), folder / "model", dirs_exist_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
