"""The argument parser's errors, which span many lines and name its own types, as one line for a person."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.errors import UserError, nearest
from lightning_prompts.files import load_yaml
from lightning_prompts.lm import LMConfig, Server

AMBIGUOUS = re.compile(
    r"Multiple subclasses with name (\w+)\. Give the full class path to avoid ambiguity: (\w[\w.]*\w(?:, \w[\w.]*\w)*)"
)
UNKNOWN_CLASS = re.compile(r"(?:Parser key \"([\w.]+)\")?.*Expected a dot import path string: (\S+)")
NOT_ACCEPTED = re.compile(r"(?:Option|option|Key|key) '([\w.\-]+)' is not (?:accepted|expected)|"
                          r"does not accept (?:nested key|option) '([\w.\-]+)'|Unrecognized arguments?:? (.+)|"
                          r"unrecognized arguments?: (.+)")  # fmt: skip
WRONG_VALUE = re.compile(r"Parser key \"([\w.]+)\": Expected an? <class '(?:\w+\.)*(\w+)'>\.? ?(?:Got value: (.*))?$")
NOT_A_CHOICE = re.compile(
    r"Parser key \"([\w.]+)\".*?Expected a typing\.Literal\[(.+?)\].*?(?:Got value|Given value): (\S+)"
)
# What a key holds, by the base class of what can be named there.
ROLES = {
    "model": "PromptMethod",
    "data": "TextDataModule",
    "members": "TextDataModule",
    "init": "Initializer",
    "callbacks": "Callback",
    "estimator": "GradientEstimator",
    "refiner": "RefinerNetwork",
    "head": "Head",
    "objective": "Objective",
    "objectives": "Objective",
    "reward": "Reward",
    "rewards": "Reward",
    "baseline": "Baseline",
    "support": "Support",
    "shaping": "Shaping",
    "proposals": "Proposals",
    "messages": "MessageChoice",
    "templates": "PosteriorTemplate",
    "sharpening": "Sharpening",
}
PLACES = {
    *ROLES,
    "config",
    "trainer",
    "budget",
    "checkpoint",
    "lm",
}  # where the parser takes a file for the settings in it
CONFIGS = (".yaml", ".yml", ".json")
FILE = re.compile(r"[^\s{}\[\],:]*(?:/[^\s{}\[\],:]*|\.yaml|\.yml|\.json)")
TOP = ("model", "data", "trainer", "budget", "checkpoint", "seed_everything", "ckpt_path", "config", "overwrite")
UNION = re.compile(r"(?:Parser key \"([\w.]+)\": )?Does not validate against any of the Union subtypes "
                   r"Subtypes: \[(.+?)\] Errors: .*Given value: (.*)$")  # fmt: skip
GIVEN_CLASS = re.compile(r"Given value: Namespace\(class_path='(?:\w+\.)*(\w+)'")
PROBLEM = re.compile(r"Problem with given class_path '(?:\w+\.)*(\w+)': ")
OTHER_TYPES = ("Not a valid subclass", "Expected a")  # how the parser says that a value is not of a type
# Settings by the names that they had, for configs of older runs.
RENAMED = {
    "crossing": "estimator",
    "relaxation": "estimator",
    "confidence": "init_logit",
    "pool": "buffer",
    "swaps": "n_replace",
}
# Classes by the paths that they had.
MOVED = re.compile(r"class_path '((?:callbacks|datamodules|lightning_prompts\.crossings)\.[\w.]+)'")
ELSEWHERE = {"lr_scheduler": "model.scheduler"}  # what other LightningCLIs call a setting
SUBCOMMAND = re.compile(r"invalid choice: '(.+?)' \(choose from (.+)\)")
REQUIRED = re.compile(r"the following arguments are required: (.+)|Key \"(.+?)\" is required")


def one_line(message: str, classes: Iterable[type], path_prefixes: tuple[str, ...] = ("fit.", "test.")) -> str:
    """What is wrong and what to do, in one line.

    Args:
        message: The parser's message.
        classes: The base classes whose subclasses can be named in a config.
        path_prefixes: Beginnings of keys that mean nothing to the user.

    Returns:
        One line, with the nearest valid names where a name is wrong.
    """
    text = " ".join(message.split())
    classes = list(classes)
    if match := AMBIGUOUS.search(text):
        return f"several classes are called {match[1]}; write the full path of one: {match[2]}"
    if match := MOVED.search(text):
        return f"unknown class {match[1]!r}; it is {_moved(match[1])} now"
    if match := UNKNOWN_CLASS.search(text):
        key, name = match.groups()
        return f"{key + ': ' if key else ''}unknown class {name!r}; {nearest(name, _class_names(classes, key))}"
    if match := NOT_A_CHOICE.search(text):
        key, choices, value = match.groups()
        return f"{key}: {value.strip(chr(39))!r} is not one of {choices.replace(chr(39), '')}"
    if match := WRONG_VALUE.search(text):
        key, kind, value = match.groups()
        return f"{key}: expected {_article(kind)}, got {value!r}" if value else f"{key}: expected {_article(kind)}"
    if match := UNION.search(text):
        key, kinds, value = match.groups()
        return f"{key + ': ' if key else ''}expected {_kinds(kinds)}, got {value.strip()!r}"[:400]
    if match := NOT_ACCEPTED.search(text):
        name = next(group for group in match.groups() if group)
        option = name.split()[0].lstrip("-").split("=")[0]
        parts = [part for part in option.split(".") if part not in ("class_path", "init_args")]
        known = _setting_names(classes)
        if parts[0] in ELSEWHERE:
            return f"unknown setting {parts[0]!r}; did you mean {ELSEWHERE[parts[0]]}?"
        wrong = next((part for part in parts if part not in known), parts[-1])
        if RENAMED.get(wrong) in (_setting_names_of(parts[:-1], classes) or known):
            return f"unknown setting {'.'.join(parts)!r}; it is called {RENAMED[wrong]} now"
        if wrong == parts[-1] and (own := _setting_names_of(parts[:-1], classes)):
            known = own
        elif len(parts) == 1 and (places := _places(wrong, classes)):  # a setting of something, in the place of that
            return f"unknown setting {wrong!r}; did you mean {', '.join(places)}?"
        return f"unknown setting {'.'.join(parts)!r}; {nearest(wrong, known)}"
    if match := SUBCOMMAND.search(text):
        name, choices = match.groups()
        commands = re.findall(r"[\w-]+", choices)
        return f"unknown command {name!r}; {nearest(name, commands)}"
    if match := REQUIRED.search(text):
        name = next(group for group in match.groups() if group)
        for prefix in path_prefixes:
            name = name.removeprefix(prefix)
        if name in ("model", "data"):
            return f"no --{name} given; {nearest('', _class_names(classes, name))}, or a config file with -c"
        return f"{name} is required"
    text = text.partition("Namespace(")[0].strip()  # the parser's own objects say nothing to a person
    return re.sub(r"Parser key \"([\w.]+)\": ", r"\1: ", text)[:400]


def not_made(error: BaseException) -> str:
    """Why a class could not be made, in its own words, which the parser hides among what other types would say.

    Args:
        error: Of the parser, while it makes what was read.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is error:
        return ""
    match, reason = GIVEN_CLASS.search(" ".join(str(error).split())), str(cause)
    if reason.startswith(OTHER_TYPES):  # one of a list was not made
        errors = str(error).partition("Errors:")[2].partition("Given value type:")[0]
        reasons = errors.split("\n  - ")[1:]
        reason = next((each for each in reasons if not each.startswith(OTHER_TYPES)), "")
    return (f"{match[1]}: " if match and reason else "") + PROBLEM.sub(r"\1: ", " ".join(reason.split()))


def check_yaml(args: Sequence[str]) -> None:
    """Name the file and line of a config that is no YAML, which the parser does not.

    So too for files that are named in place of settings (``model: other.yaml``): the parser opens whatever it is, and
    tells what stands in it.

    Args:
        args: The command line's words.

    Raises:
        UserError: A file after ``-c`` or ``--config``, or one that takes the place of settings, is no YAML.
    """
    for flag, following in zip(args, [*args[1:], ""], strict=False):
        name, equals, value = flag.partition("=")
        given = value if equals else following
        if name in ("-c", "--config"):
            if (path := Path(given)).is_file():
                content = load_yaml(path)
                if not isinstance(content, dict):
                    raise UserError(f"{path} holds no settings: it must be names with values, as in `model: ...`")
                _check_named(content, path)
        elif name.startswith("--"):
            _check_named({name.removeprefix("--").rpartition(".")[2]: given}, Path(name))


def _check_named(content: object, where: Path) -> None:
    """Look at the files that stand in place of settings, and at those that these name.

    Args:
        content: What was read, or a part of it.
        where: The file that it is from, or the option.
    """
    if isinstance(content, list):
        for item in content:
            _check_named(item, where)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key not in PLACES or not isinstance(value, str) or not FILE.fullmatch(value):
            _check_named(value, where)
            continue
        path = next((path for path in (where.parent / value, Path(value)) if path.is_file()), None)
        if path is None or not value.endswith(CONFIGS):
            kind = "does not exist" if path is None else f"is no config: its name must end in {', '.join(CONFIGS)}"
            raise UserError(f"{where}: {key}: {value} {kind}; name a class, or a YAML file with the settings")
        if path.resolve() != where.resolve():
            _check_named(load_yaml(path), path)


def user_error(error: BaseException | None) -> UserError | None:
    """The `UserError` that other errors were wrapped around, if there is one."""
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


def _moved(path: str) -> str:
    """Where a class is that was at another path.

    >>> _moved("datamodules.Antonyms"), _moved("lightning_prompts.crossings.relaxation.Softmax")
    ('lightning_prompts.datamodules.Antonyms', 'lightning_prompts.estimators.relaxations.Softmax')
    """
    inside = path if path.startswith("lightning_prompts.") else f"lightning_prompts.{path}"
    return inside.replace(".crossings.relaxation.", ".estimators.relaxations.").replace(".crossings.", ".estimators.")


def _kinds(kinds: str) -> str:
    """Types of a union in words."""
    words = re.sub(r"<class '(?:\w+\.)*(\w+)'>", lambda match: _article(match[1]), kinds)
    words = re.sub(r"(?:\w+\.)*Literal\[(.+?)\]", lambda match: f"one of {match[1]}", words)
    words = re.sub(r"\blist\[(.+?)\](?=, |$)", r"a list of \1", words).replace("'", "")
    return " or ".join(part.strip() for part in re.split(r", (?=a |an |null|true|\w+$)", words))


def _article(kind: str) -> str:
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
        "NoneType": "null",
    }.get(kind, kind)


def abstract(kind: type) -> bool:
    """Whether something is left for subclasses to write; also where no metaclass keeps count."""
    return any(getattr(getattr(kind, name, None), "__isabstractmethod__", False) for name in dir(kind))


def subclasses(base: type) -> Iterator[type]:
    """The classes below a base class that can be named in a config."""
    child: type
    for child in base.__subclasses__():
        if not abstract(child) and not child.__name__.startswith("_"):
            yield child
        yield from subclasses(child)


def settings_of(kind: type) -> dict[str, inspect.Parameter]:
    """Return the settings of a class: the parameters of its constructor, and those that ``**kwargs`` pass on."""
    found: dict[str, inspect.Parameter] = {}
    for owner in inspect.getmro(kind):
        if "__init__" in vars(owner):
            own = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
            named = {item.name: item for item in own if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}
            found = {**named, **found}
            if not any(item.kind is item.VAR_KEYWORD for item in own):
                break
    return found


def _class_names(bases: list[type], key: str | None) -> list[str]:
    """The names of the classes that a key may hold; of all of them when the key says nothing."""
    parts = [part for part in (key or "").split(".") if part not in ("class_path", "init_args")]
    wanted = next((ROLES[part] for part in reversed(parts) if part in ROLES), None)
    if key and key.split(".")[-1] == "optimizer":
        return [name for name in dir(torch.optim) if inspect.isclass(getattr(torch.optim, name))]
    chosen = [base for base in bases if wanted in (None, base.__name__)]
    return sorted({child.__name__ for base in chosen for child in subclasses(base)})


def _setting_names_of(parents: list[str], bases: list[type]) -> list[str]:
    """Settings of the classes that the innermost key may hold; nothing where that is not known."""
    role = ROLES.get(parents[-1]) if parents else None
    owners = [child for base in bases if base.__name__ == role for child in subclasses(base)]
    return sorted({name for owner in owners for name in settings_of(owner)})


def _places(name: str, bases: list[type]) -> list[str]:
    """Where a setting belongs that was given without its place."""
    owners: dict[str, list[type]] = {"model.lm": [LMConfig], "trainer": [L.Trainer]}
    for key in ("model", "data"):
        owners[key] = [child for base in bases if base.__name__ == ROLES[key] for child in subclasses(base)]
    known = {key: {option for kind in kinds for option in settings_of(kind)} for key, kinds in owners.items()}
    return [f"{key}.{name}" for key, options in known.items() if name in options]


def _setting_names(bases: list[type]) -> list[str]:
    """Every name that a setting of a method, datamodule, callback, language model or trainer has."""
    owners = [child for base in bases for child in subclasses(base)]
    owners += [L.Trainer, LMConfig, Server, LanguageLayer, Posterior]
    names = set(TOP)
    for owner in owners:
        names.update(settings_of(owner))
    return sorted(names)
