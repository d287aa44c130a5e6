"""Several tasks at once."""

from __future__ import annotations

from dataclasses import replace

from lightning_prompts.datamodules.base import SourceRow, Split, TextDataModule
from lightning_prompts.errors import UserError
from lightning_prompts.types import Example


class Mixture(TextDataModule):
    """The examples of several datamodules shuffled together; metrics are reported for all and for each.

    Args:
        members: Datamodules by the names that their metrics get.
        template: One template for all of them, with the fields that they share; ``None`` leaves each its own.
        stop: With ``template``: regular expression; a generated answer ends where it first matches.
        chat: With ``template``: render through the model's chat template.
        system: With ``template``: the system turn of a chat.
        batch_size: Examples per training step.
        eval_batch_size: Examples per evaluation step.
        max_train_examples: Keep only so many training examples of all together, drawn by ``seed``. Each member's own
            ``max_train_examples`` keeps a small one from drowning.
        seed: Seed of the members' splits and of ``max_train_examples``.
    """

    def __init__(
        self,
        members: dict[str, TextDataModule],
        template: str | None = "{prompt}: {question}\nAnswer: {answer}\n",
        stop: str = r"\n",
        chat: bool = False,
        system: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        max_train_examples: int | None = None,
        seed: int = 0,
    ) -> None:
        """Check the names."""
        text = "{prompt} {answer}" if template is None else template
        super().__init__(text, stop, chat, system, batch_size, eval_batch_size,
                         max_train_examples, seed)  # fmt: skip
        if not members:
            raise UserError("data.members is empty; give a mixture at least one datamodule")
        for name, member in members.items():
            if not name or "/" in name or name in ("nll", "exact_match", "examples", "relaxed_nll"):
                raise UserError(f"data.members: {name!r} cannot be a member's name, as metrics are named test/NAME/nll")
            if isinstance(member, Mixture):
                raise UserError(f"data.members.{name} is a mixture itself; list its members instead")
        self.members = members
        self.own_templates = template is None

    def load_rows(self) -> dict[Split, list[SourceRow]]:
        """Not used: members load their own."""
        raise NotImplementedError

    def examples(self, split: Split) -> list[Example]:
        """The members' examples, one member after another; see `TextDataModule.examples`."""
        if self._examples is None:
            self._examples = self._load()
        return super().examples(split)

    def _load(self) -> dict[Split, list[Example]]:
        merged: dict[Split, list[Example]] = {"train": [], "val": [], "test": []}
        for name, member in self.members.items():
            try:
                self._add(merged, name, member)
            except UserError as error:
                raise UserError(f"data.members.{name}: {error}") from error
        merged["train"] = self.limited(merged["train"])
        return merged

    def _add(self, merged: dict[Split, list[Example]], name: str, member: TextDataModule) -> None:
        """A member's examples to those of the others."""
        member.seed = self.seed
        if not self.own_templates:
            member.template = self.template
        for split in ("train", "val", *member.splits("test"), *(["predict"] if member.has("predict") else [])):
            target = f"test/{name}/{split.removeprefix('test/')}" if split.startswith("test/") else split
            found = [replace(example, member=name) for example in member.examples(split)]
            merged.setdefault(target, []).extend(found)

    def member_names(self, split: Split) -> tuple[str, ...]:
        """All members, but for the further test sets, which are one member's."""
        return tuple(self.members) if split in ("val", "test") else ()
