"""``lightning-prompts`` and ``python -m lightning_prompts``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit."""
    from lightning_prompts.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
