"""Errors in one line: the argument parser's, which span many lines and name Python types, and those of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence

import lightning as L

from lightning_prompts.checkpoints import does_not_fit
from lightning_prompts.cli.checks import TOP
from lightning_prompts.cli.classes import CONFIGURABLE, class_names, role, settings_of, subclasses
from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import no_room
from lightning_prompts.lm import LMConfig, Server
from lightning_prompts.lm.failures import out_of_memory
from lightning_prompts.methods import PromptMethod
from lightning_prompts.processes import process_lost

# Settings that other LightningCLIs, or older configs, call by another name.
RENAMED = {
    "lr_scheduler": "model.scheduler",
    "crossing": "estimator",
    "relaxation": "estimator",
    "confidence": "init_logit",
    "pool": "buffer",
    "swaps": "n_replace",
}
# What the parser says; white space is single.
MOVED = re.compile(r"class_path '((?:callbacks|datamodules|lightning_prompts\.crossings)\.[\w.]+)'")
UNKNOWN_CLASS = re.compile(r"(?:Parser key \"([\w.]+)\")?.*Expected a dot import path string: (\S+)")
NOT_ACCEPTED = re.compile(
    r"(?:does not accept (?:nested key|option)|[Oo]ption|[Kk]ey) '([\w.\-]+)'|"
    r"[Uu]nrecognized arguments?:? (.+)"
)
REQUIRED = re.compile(r"the following arguments are required: (?:fit|validate|test|predict)\.(model|data)$")
VALUE = re.compile(r"Parser key \"([\w.]+)\": Expected an? (.+?)\.? Got value: (.*)$")
UNION = re.compile(
    r"(?:Parser key \"([\w.]+)\": )?.*?Does not validate against any of the Union subtypes "
    r"Subtypes: \[(.+)\] Errors: .*Given value: (.*)$"
)
GIVEN_CLASS = re.compile(r"Given value: Namespace\(class_path='(?:\w+\.)*(\w+)'")
PROBLEM = re.compile(r"Problem with given class_path '(?:\w+\.)*(\w+)': ")
OTHER_TYPES = ("Not a valid subclass", "Expected a")  # the reasons of the types of a union that were not meant


def to_user_error(error: BaseException) -> UserError | None:
    """The error to show in place of any other; ``None`` if the error is not a known one."""
    if isinstance(error, RecursionError):
        return UserError("a config or data file is nested too deeply, or holds itself")
    known = user_error(error) or no_room(error) or process_lost(error)
    if known is None and out_of_memory(error):
        return UserError(
            "out of memory; lower data.batch_size and data.eval_batch_size, or set model.lm.dtype: bfloat16 or "
            "model.lm.gradient_checkpointing: true"
        )
    known = known or does_not_fit(error)
    if known is None and "Does not validate against" in str(error):  # the parser, while it builds a class
        return UserError(build_error(error) or one_line(str(error)))
    return known


def user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` among the causes and contexts of an error, if there is one."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        if isinstance(current, UserError):
            return current
        seen.add(id(current))
        pending += [current.__context__, current.__cause__]
    return None


def one_line(message: str) -> str:
    r"""A message of the parser in one line, with the nearest valid names if a name is wrong.

    >>> one_line('Parser key "trainer.max_epochs":\n  Expected a <class \'int\'>. Got value: x')
    "trainer.max_epochs: expected int, got 'x'"
    """
    text = " ".join(message.split())
    if match := MOVED.search(text):
        return f"unknown class {match[1]!r}; it is {_moved(match[1])} now"
    if match := UNKNOWN_CLASS.search(text):
        key, name = match.groups()
        return f"{key + ': ' if key else ''}unknown class {name!r}; {nearest(name, class_names(key or ''))}"
    if match := REQUIRED.search(text):
        return f"no --{match[1]} given; {nearest('', class_names(match[1]))}, or a config file with -c"
    if match := VALUE.search(text) or UNION.search(text):
        key, kinds, value = match.groups()
        return f"{key + ': ' if key else ''}expected {_types(kinds)}, got {value.strip()!r}"[:400]
    if match := NOT_ACCEPTED.search(text):
        option = str(match[1] or match[2]).split()[0].lstrip("-").partition("=")[0]
        return _unknown_setting([part for part in option.split(".") if part not in ("class_path", "init_args")])
    text = text.partition("Namespace(")[0].strip()  # the parser's own objects mean nothing to a user
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    return re.sub(r"Parser key \"([\w.]+)\": ", r"\1: ", text)[:400]


def build_error(error: BaseException) -> str:
    """Why a class could not be built: the reason that the class gave, without those of the other types of a union.

    Args:
        error: The parser's, while it builds what it has parsed.

    Returns:
        One line; empty if the error has no cause.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is error:
        return ""
    match, reason = GIVEN_CLASS.search(" ".join(str(error).split())), str(cause)
    if reason.startswith(OTHER_TYPES):  # an item of a list could not be built
        errors = str(error).partition("Errors:")[2].partition("Given value type:")[0]
        reasons = errors.split("\n  - ")[1:]
        reason = next((each for each in reasons if not each.startswith(OTHER_TYPES)), "")
    return (f"{match[1]}: " if match and reason else "") + PROBLEM.sub(r"\1: ", " ".join(reason.split()))


def _types(kinds: str) -> str:
    """Types as the parser names them, in words.

    >>> _types("<class 'int'>, typing.Literal['auto', 'max'], list[a.b.C], <class 'NoneType'>")
    'int or auto|max or list[C] or null'
    """
    text = re.sub(r"<class '([\w.]+)'>", r"\1", kinds).replace("NoneType", "null")
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)
    text = re.sub(r"Literal\[(.+?)\]", lambda match: match[1].replace("'", "").replace(", ", "|"), text)
    return re.sub(r", (?![^\[]*\])", " or ", text)


def _moved(path: str) -> str:
    """The new path of a class that older configs name.

    >>> _moved("datamodules.Antonyms"), _moved("lightning_prompts.crossings.relaxation.Softmax")
    ('lightning_prompts.datamodules.Antonyms', 'lightning_prompts.estimators.relaxations.Softmax')
    """
    inside = path if path.startswith("lightning_prompts.") else f"lightning_prompts.{path}"
    return inside.replace(".crossings.relaxation.", ".estimators.relaxations.").replace(".crossings.", ".estimators.")


def _unknown_setting(parts: Sequence[str]) -> str:
    """What to write instead of a setting that does not exist; ``parts`` are those of its dotted name."""
    others = (L.Trainer, LMConfig, Server, LanguageLayer, Posterior)
    everywhere = TOP | _settings((*CONFIGURABLE, *others))
    wrong = next((part for part in parts if part not in everywhere), parts[-1])
    path = ".".join(parts)
    if wrong in RENAMED:
        return f"unknown setting {path!r}; it is called {RENAMED[wrong]} here"
    if len(parts) == 1 and (places := _places(wrong)):
        return f"unknown setting {path!r}; did you mean {', '.join(places)}?"
    base = role(".".join(parts[:-1])) if wrong == parts[-1] else None
    return f"unknown setting {path!r}; {nearest(wrong, sorted(_settings([base]) if base else everywhere))}"


def _places(name: str) -> list[str]:
    """Where a setting belongs that was given without its place, as in ``trainer.max_steps``."""
    owners = {"model.lm": LMConfig, "trainer": L.Trainer, "model": PromptMethod, "data": TextDataModule}
    return [f"{key}.{name}" for key, base in owners.items() if name in _settings([base])]


def _settings(bases: Sequence[type]) -> set[str]:
    """The settings of some classes and of those below them."""
    return {name for base in bases for kind in (base, *subclasses(base)) for name in settings_of(kind)}
