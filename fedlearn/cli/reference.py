"""The generated parts of the documentation: `python -m fedlearn.cli.reference` writes them, a test compares them.

docs/cli.md     every command's help, and the exit codes
docs/study.md   the table of keys, between its markers
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types as at
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedlearn import study
from fedlearn.cli.catalogue import exit_code_table, nature

if TYPE_CHECKING:
    import click


BEGIN, END = "<!-- generated: {} -->", "<!-- end of the generated part -->"
WIDTH: Final = 80
ROOT: Final = Path(__file__).resolve().parents[2]


def command_reference() -> str:
    """docs/cli.md as a whole."""
    lines = [
        "# The command line",
        "",
        "Written by `make docs` from the program itself. Every command takes `--json` where it prints results, and `--debug` for",
        "tracebacks. Results go to standard output; progress, notes and errors go to standard error.",
        "",
        "## Exit codes",
        "",
        "| code | kind | meaning |",
        "|---:|---|---|",
        *(f"| {code} | {kind} | {text} |" for code, kind, text in exit_code_table()),
        "",
    ]
    for path in command_paths():
        lines += [f"## fedlearn {' '.join(path)}".rstrip(), "", "```", help_text(path).rstrip(), "```", ""]
    return "\n".join(lines)


def command_paths() -> list[tuple[str, ...]]:
    """Every command, the program itself first."""
    import typer

    from fedlearn.cli.commands import app

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    root: click.Command = typer.main.get_command(app)
    return list(walk(root, ()))


def help_text(path: tuple[str, ...]) -> str:
    """What `fedlearn PATH --help` prints where nobody says how wide the screen is."""
    from fedlearn.cli.entry import main

    out, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        with redirect_stdout(out):
            main([*path, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return out.getvalue()


def study_keys() -> list[tuple[str, str, str, str]]:
    """(key, value in words, default, what it does) of every key of a study, in order."""
    return list(_keys(study.Study, ""))


def study_table() -> str:
    """The table of keys for docs/study.md."""
    rows = [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in study_keys()]
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *rows])


def task_table() -> str:
    """The tasks, for the README."""
    from fedlearn.data.catalogue import list_data

    rows = [
        f"| `{e.name}` | {e.card.title} | {nature(e.card)} | {e.card.licence} | {e.card.clients} |" for e in list_data()
    ]
    return "\n".join(["| task | learns | data | licence | clients |", "|---|---|---|---|---|", *rows])


def strategy_table() -> str:
    """The strategies, for the README."""
    from fedlearn.app import load_app

    load_app()
    registry: Any = importlib.import_module("strategies")
    found = [registry.describe(name) for name in registry.names()]
    rows = [f"| `{one.name}` | {one.summary} | {one.paper} | {'sum' if one.linear else 'stack'} |" for one in found]
    return "\n".join(["| strategy | | paper | takes |", "|---|---|---|---|", *rows])


def heart_table() -> str:
    """The AUC table out of the heart benchmark's result."""
    lines = (ROOT / "benchmarks" / "results" / "heart.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("|"))
    return "\n".join(lines[first:last])


PARTS: Final = {
    "study.md": {"keys": study_table},
    "../README.md": {"tasks": task_table, "strategies": strategy_table, "heart": heart_table},
}
"""Page, relative to docs/, to its generated parts."""


def with_parts(page: str, text: str) -> str:
    """A page with its generated parts made anew."""
    for name, make in PARTS[page].items():
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END)
        text = f"{before}{BEGIN.format(name)}\n\n{make()}\n\n{END}{after}"
    return text


def pages() -> dict[Path, str]:
    """Every page that has a generated part, as it should stand."""
    docs = ROOT / "docs"
    made = {(docs / name).resolve(): with_parts(name, (docs / name).read_text(encoding="utf-8")) for name in PARTS}
    return {docs / "cli.md": command_reference(), **made}


def _keys(table: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    texts, hints = _docstrings(table), get_type_hints(table, include_extras=True)
    for name, info in table.model_fields.items():
        kind, by_name = study.table_of(info.annotation)
        if kind is not None:
            yield from _keys(kind, f"{prefix}{name}.NAME." if by_name else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _in_words(hints[name]), _default(info), texts.get(name, "")


def _docstrings(table: type[BaseModel]) -> dict[str, str]:
    """The string that stands below each field in the source."""
    body = ast.parse(inspect.getsource(table)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for one, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(one.target, ast.Name)
            found[one.target.id] = " ".join(str(below.value.value).split())  # a row of a table is one line
    return found


def _in_words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return _in_words(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is Annotated:
        return ", ".join(filter(None, [_in_words(parts[0]), _bounds(parts[1:])]))
    if origin is dict:
        return "a table"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _bounds(extras: tuple[Any, ...]) -> str:
    words = {at.Ge: "at least", at.Gt: "above", at.Le: "at most", at.Lt: "below"}
    found = []
    for one in (item for extra in extras for item in (extra.metadata if isinstance(extra, FieldInfo) else [extra])):
        if type(one) in words:
            value = (
                next(iter(vars(one).values())) if hasattr(one, "__dict__") else getattr(one, type(one).__name__.lower())
            )
            found.append(f"{words[type(one)]} {_number(value)}")
    return " and ".join(found)


def _number(value: Any) -> str:
    return "2^63" if value == 2**63 else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if value is None or value in ({}, ""):
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def main() -> int:
    """Write every page."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
