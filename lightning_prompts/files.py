"""Write files atomically, and read text, YAML and JSON files with clear errors."""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lightning_prompts.errors import UserError, in_one_line

FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if libyaml is available
CONFIGS = Path(__file__).parent / "configs"  # the configs that are installed; in a checkout a link to experiments/
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException) -> UserError | None:
    """Return a `UserError` for an error that means that the disk is full; ``None`` for other errors."""
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
        return None
    where = f" for {error.filename}" if error.filename else ""
    return UserError(
        f"no space left on the disk{where} ({error.strerror}); earlier checkpoints are intact. Free some space and "
        "resume with --ckpt_path last"
    )


def cache_root() -> Path:
    """Return the cache folder: ``LIGHTNING_PROMPTS_CACHE``, or a folder in the user's cache folder."""
    chosen = os.environ.get("LIGHTNING_PROMPTS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-prompts"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically through a temporary file in its folder, safe against interruption and a full disk.

    Raises:
        UserError: The disk is full. An earlier version of the file is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(work, 0o644)  # mkstemp makes private files
            os.replace(work, path)
        except BaseException:
            Path(work).unlink(missing_ok=True)
            raise
    except OSError as error:
        error.filename = str(path)  # instead of the temporary file
        if full := no_room(error):
            raise full from error
        raise


def packaged_configs() -> list[str]:
    """The names of the installed configs, such as ``antonyms/soft_prompt.yaml``."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("**/*.yaml"))


def find_config(name: str | Path) -> Path:
    """Find a config: a file, or else the installed config of this name, which is then named on stderr.

    Args:
        name: A path, or the name of an installed config.

    Raises:
        UserError: There is neither; for a relative path, the message has the closest names.
    """
    path = Path(name)
    if path.exists():
        return path
    if path.is_absolute():
        raise UserError(f"{name} does not exist")
    known = packaged_configs()
    if path.as_posix() in known:
        print(f"{name} is the installed {CONFIGS / path}", file=sys.stderr)
        return CONFIGS / path
    close = difflib.get_close_matches(path.as_posix(), known, cutoff=0.7)
    listed = f"did you mean {', '.join(close)}?" if close else "`lightning-prompts configs` lists the installed ones"
    raise UserError(f"{name} does not exist; {listed}")


def load_yaml(path: Path) -> Any:  # noqa: ANN401 - any YAML value
    """Load a YAML file.

    Raises:
        UserError: The file does not exist or is not valid YAML; the message contains the line.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    return parse_yaml(read_text(path) or "", path)


def parse_yaml(text: str, path: Path, loader: Any = yaml.SafeLoader) -> Any:  # noqa: ANN401 - see `load_yaml`
    """Parse the text of a YAML file.

    Args:
        text: The YAML text.
        path: Path of the file in messages.
        loader: A safe loader of the yaml package.

    Raises:
        UserError: The text is not valid YAML; the message contains the line.
    """
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a config") from error
    except ValueError as error:  # of a value that looks like a date or a number
        raise UserError(
            f"{path} is not valid YAML: {in_one_line(error)}; put texts like 2024-02-30 in quotes"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from error


def read_text(path: Path) -> str | None:
    """Read a text file; return ``None`` if it does not exist.

    Raises:
        UserError: The file is not text, or cannot be read.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:  # before all of it is in memory
            if b"\0" in file.read(4096):
                raise UserError(f"{path} is not a text file: it contains zero bytes; save it as UTF-8 text")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UserError(f"{path} line {text.count(chr(10), 0, text.index(chr(0))) + 1} contains a zero byte; remove it")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; return ``None`` if the file does not exist.

    Raises:
        UserError: The file does not contain a JSON object.
    """
    text = read_text(path)
    return None if text is None else parse_json(text, str(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON text.
        where: Name of the source in messages.

    Raises:
        UserError: The text is not a JSON object.
    """
    try:
        return as_mapping(json.loads(text), where)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"{where} is not valid JSON: {reason}; test or fit the run again, or leave it out") from error


def as_mapping(value: object, where: str) -> dict[str, Any]:
    """Convert a value to a dictionary with text keys.

    Args:
        value: The value.
        where: Name of the source in messages.

    Raises:
        UserError: The value is not a dictionary.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} must contain names and values, got {type(value).__name__}")
    return {str(name): item for name, item in value.items()}
