"""Writing and reading files: what is written is either whole or not there, what is read is of a sane kind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lightning_prompts.errors import UserError

FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> UserError | None:
    """What to tell about an error that means a full disk; ``None`` for others."""
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
        return None
    where = f" for {error.filename}" if error.filename else ""
    return UserError(
        f"no room on the disk{where} ({error.strerror}); the checkpoints that were written before are whole. "
        "Make room and go on with --ckpt_path last"
    )


def cache_root() -> Path:
    """The folder for what is computed once: ``LIGHTNING_PROMPTS_CACHE``, else one in the user's cache folder."""
    chosen = os.environ.get("LIGHTNING_PROMPTS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-prompts"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it, so that neither a killed process nor a full disk leaves half.

    Raises:
        UserError: There is no room; what was there before still is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(work, 0o644)  # mkstemp's files are private
            os.replace(work, path)
        except BaseException:
            Path(work).unlink(missing_ok=True)
            raise
    except OSError as error:
        error.filename = str(path)  # and not the temporary one
        if told := no_room(error):
            raise told from error
        raise


def check_text(path: Path) -> None:
    """Raise a `UserError` if a file that ought to be text is not: before all of it is read into memory."""
    with path.open("rb") as file:
        if b"\0" in file.read(4096):
            raise UserError(f"{path} is not a text file: it holds zero bytes (UTF-8 is what is read here)")


def load_yaml(path: Path) -> Any:  # noqa: ANN401 - whatever stands in it
    """What a YAML file holds.

    Raises:
        UserError: It does not exist, or is no YAML: the line, and what is wrong there.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    check_text(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path, loader: Any = yaml.SafeLoader) -> Any:  # noqa: ANN401 - see `load_yaml`
    """What YAML holds that stands in a file.

    Args:
        text: The YAML.
        path: Where it stands, for errors.
        loader: A safe one of yaml's.

    Raises:
        UserError: It is none: the line, and what is wrong there.
    """
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a config") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from error


def read_text(path: Path) -> str | None:
    """A text file; ``None`` where there is none.

    Raises:
        UserError: It is not text, or cannot be read.
    """
    if not path.exists():
        return None
    try:
        check_text(path)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{path} line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a zero byte; remove it")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object."""
    text = read_text(path)
    return None if text is None else parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ``where`` it stands is for errors.

    Raises:
        UserError: It is none.
    """
    try:
        return as_mapping(json.loads(text), where)
    except (json.JSONDecodeError, RecursionError) as error:
        told = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"{where} is not valid JSON: {told}; test or fit the run again, or leave it out") from error


def as_mapping(value: object, where: str) -> dict[str, Any]:
    """Names and values, or a `UserError` that says where there are none."""
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold names and values, got {type(value).__name__}")
    return {str(name): item for name, item in value.items()}
