"""Count the parameters of Refiners for a model of a given shape, without allocating memory.

python experiments/refiner_sizes.py --lm random:llama,hidden_size=4096,vocab_size=32000 --length 20
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from lightning_prompts.errors import UserError
from lightning_prompts.lm.embedded import EMBEDDED, embedded_folder
from lightning_prompts.refiners.heads import Factored, Full, Tied
from lightning_prompts.refiners.networks import MLPRefiner, TransformerRefiner
from lightning_prompts.refiners.refiner import ScoreRefiner, part_sizes


def shape(name: str) -> tuple[int, int]:
    """Return width ``D`` and vocabulary ``V`` of a model from its config."""
    if name.startswith("random:"):
        kind, *pairs = name.removeprefix("random:").split(",")
        settings = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        config = AutoConfig.for_model(kind, **settings)
    else:
        config = AutoConfig.from_pretrained(embedded_folder(name) if name in EMBEDDED else name)
    text = config.get_text_config()
    return int(text.hidden_size), int(text.vocab_size)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm", default="random:llama,hidden_size=4096,vocab_size=32000", help="Llama-2-7B's shape")
    parser.add_argument("--length", type=int, default=20, help="P")
    parser.add_argument("--features", type=int, default=256, help="F, width of the refiner's features")
    parser.add_argument("--rank", type=int, default=64, help="rank of the factored head")
    options = parser.parse_args()
    if options.length < 1:
        raise UserError(f"--length must be at least 1, got {options.length}")
    width, vocabulary = shape(options.lm)
    title = f"{options.lm}: D = {width:,}, V = {vocabulary:,}, P = {options.length}"
    table = Table("refiner", "head", "network parameters", "head parameters", "total (with the base)", title=title)
    for network in (MLPRefiner(options.features), TransformerRefiner(options.features)):
        for head in (Tied(), Factored(options.rank), Full(max_parameters=float("inf"))):
            with torch.device("meta"):
                base, matrix = torch.empty(options.length, vocabulary), torch.empty(vocabulary, width)
                sizes = part_sizes(ScoreRefiner(base, matrix, network, head, width))
            counts = (sizes["network"], sizes["head"], sum(sizes.values()))
            table.add_row(type(network).__name__, type(head).__name__, *(f"{count:,}" for count in counts))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())[:300]}")
