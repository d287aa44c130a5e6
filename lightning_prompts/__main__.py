"""``lightning-prompts`` and ``python -m lightning_prompts``."""

from __future__ import annotations

import os
import sys

from lightning_prompts import __version__, commands


def spare_cores() -> None:
    """Let threads sleep while they wait for each other, where other programs want the cores as well.

    Waiting threads spin by default, which makes a step several times as slow on a busy machine; on an idle one, waking
    them takes longer. OpenMP reads the variable when torch is imported.
    """
    try:
        busy = os.getloadavg()[0]
    except (AttributeError, OSError):  # as on Windows
        return
    if busy >= (os.cpu_count() or 1) / 2:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Run the command line and exit."""
    spare_cores()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could follow
        from lightning_prompts.completion import complete

        complete()
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(commands.usage())
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        print(f"lightning-prompts {__version__}")
        sys.exit()
    if args[0] in commands.COMMANDS:
        sys.exit(commands.run(args))
    # Options may stand ahead of Lightning's subcommands; only it knows which take a value.
    if not args[0].startswith("-") and (said := commands.unknown(args[0])):
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    from lightning_prompts.cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
