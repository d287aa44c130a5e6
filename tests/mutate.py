"""Change lines of the product at random, one at a time, and count the changes that the tests notice.

    python -m pytest --numprocesses 2 --dist loadfile --cov=lightning_prompts --cov-context=test
    python tests/mutate.py --count 30 --seed 0

The first command records which test runs which line (in ``.coverage``). The second one changes a copy of the project,
runs the tests that run the changed line, and prints a table. A script that is run by hand, as it takes an hour.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coverage import CoverageData

from support.project import ROOT

FOLDERS = ("lightning_prompts", "datamodules", "callbacks")
COMPARED: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
CALCULATED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
# Nothing in these is behaviour: messages, types, documentation, what is only checked.
SKIPPED = (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.ImportFrom, ast.Import)


@dataclass(frozen=True)
class Change:
    """Characters of a line, and what takes their place."""

    path: Path
    line: int
    start: int
    end: int
    new: str

    def applied(self, source: str) -> str:
        """The changed source."""
        lines = source.splitlines(keepends=True)
        line = lines[self.line - 1].encode()
        lines[self.line - 1] = (line[: self.start] + self.new.encode() + line[self.end :]).decode()
        return "".join(lines)


def changes(path: Path) -> list[Change]:
    """All changes that can be made to a file."""
    source = path.read_text(encoding="utf-8")
    return [Change(path, *place) for place in _places(ast.parse(source), source.encode().splitlines())]


def _places(node: ast.AST, lines: list[bytes]) -> Iterator[tuple[int, int, int, str]]:
    if isinstance(node, SKIPPED):
        return
    yield from _of(node, lines)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _places(child, lines)


def _of(node: ast.AST, lines: list[bytes]) -> Iterator[tuple[int, int, int, str]]:
    """The changes of one node: line, from where, to where, and the new text."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield from _between(node.left, node.comparators[0], COMPARED.get(type(node.ops[0])), lines)
    elif isinstance(node, ast.BinOp) and not any(_is_text(part) for part in (node.left, node.right)):
        yield from _between(node.left, node.right, CALCULATED.get(type(node.op)), lines)
    elif isinstance(node, ast.BoolOp):
        swap = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield from _between(node.values[0], node.values[1], swap, lines)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and node.lineno == node.operand.lineno:
        yield node.lineno, node.col_offset, node.col_offset + len("not "), ""
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float) and node.end_lineno == node.lineno:
        assert node.end_col_offset is not None
        new = repr(not node.value) if isinstance(node.value, bool) else repr(node.value + 1)  # type: ignore[operator]
        yield node.lineno, node.col_offset, node.end_col_offset, new
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.end_lineno == node.lineno:
        assert node.end_col_offset is not None
        yield node.lineno, node.col_offset, node.end_col_offset, "pass"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _between(
    left: ast.expr, right: ast.expr, swap: tuple[str, str] | None, lines: list[bytes]
) -> Iterator[tuple[int, int, int, str]]:
    """The operator between two operands on the same line."""
    if swap is None or left.end_lineno != right.lineno or left.end_col_offset is None:
        return
    between = lines[right.lineno - 1][left.end_col_offset : right.col_offset]
    if between.count(swap[0].encode()) == 1:
        start = left.end_col_offset + between.index(swap[0].encode())
        yield right.lineno, start, start + len(swap[0]), swap[1]


def tests_by_line(data: CoverageData) -> dict[tuple[Path, int], list[str]]:
    """The tests that run each line of the product."""
    found: dict[tuple[Path, int], list[str]] = {}
    for file in data.measured_files():
        path = Path(os.path.realpath(file))
        for line, contexts in data.contexts_by_lineno(file).items():
            tests = sorted({context.split("|")[0] for context in contexts if context})
            found[path, line] = tests
    return found


def noticed(change: Change, tests: list[str], copy: Path, seconds: int) -> bool:
    """Whether one of the tests fails, or hangs, after a change."""
    path = copy / change.path.relative_to(ROOT)
    before = path.read_text(encoding="utf-8")
    path.write_text(change.applied(before), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(before, encoding="utf-8")
    return done.returncode != 0


def main() -> None:
    """Draw changes, try each, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=60, help="run so many tests for a change at most")
    parser.add_argument("--seconds", type=int, default=300, help="a change whose tests take longer counts as noticed")
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    arguments = parser.parse_args()
    data = CoverageData(str(arguments.coverage))
    data.read()
    tests = tests_by_line(data)
    generator = random.Random(arguments.seed)
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    drawn = generator.sample([change for path in paths for change in changes(path)], arguments.count)
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs", "*.egg-info")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        for change in drawn:
            known = tests.get((change.path, change.line), [])
            chosen = known if len(known) <= arguments.tests else generator.sample(known, arguments.tests)
            seen = bool(chosen) and noticed(change, chosen, copy, arguments.seconds)
            caught += seen
            line = change.path.read_text(encoding="utf-8").splitlines()[change.line - 1]
            new = change.applied(change.path.read_text(encoding="utf-8")).splitlines()[change.line - 1]
            verdict = "caught" if seen else "missed" if chosen else "not run by a test"
            place = f"{change.path.relative_to(ROOT)}:{change.line}"
            print(f"{verdict} | {place} | `{line.strip()}` -> `{new.strip()}`", flush=True)
    print(f"{caught} of {len(drawn)} changes were caught")


if __name__ == "__main__":
    main()
