"""``lightning-prompts`` and ``python -m lightning_prompts``."""

from __future__ import annotations

import os
import sys

from lightning_prompts import __version__
from lightning_prompts.cli.commands import run, usage


def spare_cores() -> None:
    """Let idle threads sleep if other programs keep the machine busy.

    By default threads spin while they wait for each other. This slows a step down several times on a busy machine; on
    an idle one, waking threads up takes longer. OpenMP reads the variable when torch is imported.
    """
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # as on Windows
        return
    if load >= (os.cpu_count() or 1) / 2:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and exit."""
    spare_cores()
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        print(f"lightning-prompts {__version__}")
        sys.exit()
    sys.exit(run(args))


if __name__ == "__main__":
    main()
