"""``lightning-prompts plan``: print how much memory a config needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_prompts.cli.checks import check
from lightning_prompts.cli.commands import CommandParser, size
from lightning_prompts.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_prompts.memory_plan import MemoryPlan, Processes


def parser() -> CommandParser:
    """The arguments besides those of ``fit``."""
    return CommandParser(
        "lightning-prompts plan",
        allow_abbrev=False,
        description="Estimate the memory that a run needs in each process. Takes the arguments of fit "
        "(-c FILE.yaml, --model..., --data..., --trainer...), and loads no weights.",
    )


def main(args: Sequence[str]) -> int:
    """Print the memory plan of a config.

    Args:
        args: The arguments of ``fit``.

    Returns:
        The exit code.

    Raises:
        UserError: The config is not valid, or there is nothing to plan for.
    """
    _, words = parser().parse_known_args(list(args))
    words = check(words)

    from rich.console import Console

    from lightning_prompts.accelerators import device_type
    from lightning_prompts.cli.main import PlannedRun
    from lightning_prompts.memory_plan import batches_of, make_plan

    run = PlannedRun(words)
    plan = make_plan(
        run.model,
        batches_of(run.datamodule, "train"),
        batches_of(run.datamodule, "val"),
        processes(run.trainer_config),
        device_type(str(run.trainer_config.accelerator)),
    )
    Console().print(as_table(plan))
    return 0


def processes(trainer: Any) -> Processes:  # noqa: ANN401 - a jsonargparse namespace
    """How the trainer of a config splits the work."""
    from lightning_prompts.memory_plan import Processes
    from lightning_prompts.parallel import mesh_sizes

    nodes = int(trainer.num_nodes)
    devices = _device_count(trainer.devices)
    for name, count in (("num_nodes", nodes), ("devices", devices)):
        if count < 1:
            raise UserError(f"trainer.{name} must be at least 1, got {getattr(trainer, name)}")
    strategy = trainer.strategy
    if str(getattr(strategy, "class_path", "")).endswith("LMParallel"):
        sizes = strategy.init_args
        shards, heads = sizes.data_parallel_size, sizes.tensor_parallel_size
        if "auto" in (shards, heads):  # the devices may be those of another machine, so they count only here
            shards, heads = mesh_sizes(shards, heads, nodes, devices)
        return Processes(int(shards), int(shards), int(heads))
    return Processes(nodes * devices)


def _device_count(devices: Any) -> int:  # noqa: ANN401 - a number, a list of numbers, either as text, or auto
    """How many devices a trainer uses; for -1 and ``auto`` all devices of this machine."""
    import torch

    if isinstance(devices, str) and re.fullmatch(r"[\d\s,]+", devices):
        devices = [part for part in devices.split(",") if part.strip()] if "," in devices else int(devices)
    if isinstance(devices, list | tuple):
        return len(devices)
    return devices if isinstance(devices, int) and devices != -1 else torch.cuda.device_count() or 1


def as_table(plan: MemoryPlan) -> Table:
    """The plan as a table for the terminal."""
    from rich.table import Table

    table = Table("in each process", "training", "evaluation", title=plan.title)
    for column in table.columns[1:]:
        column.justify = "right"
    for item in plan.items:
        shown = [size(item.bytes) if item.when in ("always", phase) else "" for phase in ("training", "evaluation")]
        table.add_row(item.name, *shown)
    table.add_section()
    table.add_row("together", size(plan.total("training")), size(plan.total("evaluation")))
    return table
