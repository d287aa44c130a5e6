"""``lightning-prompts configs``: list the configs that are installed, or print one."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_prompts.cli.commands import CommandParser
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import CONFIGS, packaged_configs


def parser() -> CommandParser:
    """The arguments."""
    made = CommandParser(
        prog="lightning-prompts configs",
        description="List the installed configs. fit, test, sweep and the other commands take their names: fit -c "
        "antonyms/soft_prompt.yaml. A file of the same name in the current folder goes first. With a NAME, print that "
        "config, to start your own from it.",
    )
    made.add_argument("name", nargs="?", metavar="NAME", help="print this config")
    return made


def main(args: Sequence[str]) -> int:
    """Print the names with the first line of each config, or one config.

    Args:
        args: The words after ``configs``.

    Returns:
        The exit code.

    Raises:
        UserError: There is no config of this name.
    """
    name, known = parser().parse_args(list(args)).name, packaged_configs()
    if name is not None and name not in known:
        raise UserError(f"no config is called {name!r}; {nearest(name, known)}")
    if name is not None:
        print((CONFIGS / name).read_text(encoding="utf-8"), end="")
        return 0
    width = max(map(len, known))
    for each in known:
        first = (CONFIGS / each).read_text(encoding="utf-8").partition("\n")[0]
        print(f"{each:<{width}}  {first.removeprefix('# ')}")
    return 0
