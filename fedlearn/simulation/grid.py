"""A grid over a study's keys: `strategy=fedavg,fedprox` and `seed=0..4` make ten studies."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from pydantic import BaseModel

from fedlearn.errors import LimitExceededError, StudyError
from fedlearn.study import Study, table_of

MAX_CELLS: Final = 10_000
NAMES: Final = {"strategy": "strategy.name", "task": "task.name"}
"""Short names that no key's last part gives."""
SEED: Final = "seed"
_RANGE: Final = re.compile(r"(-?\d+)\.\.(-?\d+)")
_NAME_LENGTH: Final = 100


@dataclass(frozen=True)
class Axis:
    """One key and the values that it takes.

    Args:
        name: as it was given.
        key: of the study.
        values: as text, in order.
    """

    name: str
    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One study of a grid.

    Args:
        values: axis name to its value, as text.
        study: the study with these values.
    """

    values: Mapping[str, str]
    study: Study = field(repr=False)

    @property
    def label(self) -> str:
        """For people: `strategy=fedavg, seed=0`."""
        return ", ".join(f"{name}={value}" for name, value in self.values.items())

    @property
    def folder(self) -> str:
        """A name for a folder, different for different values."""
        text = ",".join(f"{name}={value}" for name, value in self.values.items())
        plain = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
        if plain != text or len(plain) > _NAME_LENGTH:
            plain = f"{plain[:_NAME_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return plain or "study"


def short_names() -> dict[str, str]:
    """Short name to key: the last part of each key that no other key ends in, and `NAMES`."""
    keys = list(_keys(Study, ""))
    count = Counter(key.rpartition(".")[2] for key in keys)
    last = {key.rpartition(".")[2]: key for key in keys}
    return {
        **{name: key for name, key in last.items() if count[name] == 1 and name not in {"name", "options"}},
        **NAMES,
    }


def parse_axis(text: str) -> Axis:
    """One `--grid`.

    Args:
        text: `KEY=VALUE,VALUE`, with a key of the study or a short name; `0..4` stands for 0,1,2,3,4.

    Raises:
        StudyError: the key is unknown, or there is no value.
        LimitExceededError: a range of more than `MAX_CELLS` numbers.
    """
    name, equals, rest = text.partition("=")
    name = name.strip()
    values = tuple(one for part in _split(rest) for one in _expand(part.strip()) if one)
    if not equals or not name or not values:
        raise StudyError(
            f"--grid {text!r}: expected KEY=VALUE,VALUE", hint="for example --grid strategy=fedavg,fedprox or seed=0..4"
        )
    return Axis(name, _key_of(name), tuple(dict.fromkeys(values)))


def make_cells(study: Study, axes: Sequence[Axis]) -> list[Cell]:
    """Every combination, the last axis fastest.

    Raises:
        StudyError: two axes for one key, or a combination that is no valid study.
        LimitExceededError: more than `MAX_CELLS` combinations.
    """
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise StudyError(
            f"--grid: {', '.join(sorted(keys))} names a key twice", hint="give all its values in one --grid"
        )
    total = 1
    for axis in axes:
        total *= len(axis.values)
    if total > MAX_CELLS:
        raise LimitExceededError(f"--grid: {total} studies, limit MAX_CELLS is {MAX_CELLS}")
    cells = []
    for values in itertools.product(*(axis.values for axis in axes)):
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        named = dict(zip((axis.name for axis in axes), values, strict=True))
        cells.append(Cell(named, study.with_overrides(overrides)))
    return cells


def _key_of(name: str) -> str:
    if "." in name:
        return name  # the study itself says whether there is such a key
    names = short_names()
    if name in names:
        return names[name]
    several = [key for key in _keys(Study, "") if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"one of {', '.join(several)}" if several else f"did you mean {near[0]!r}?" if near else "name the whole key"
    raise StudyError(f"--grid: {name!r} is no short name of one key", hint=hint)


def _keys(table: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in table.model_fields.items():
        kind, named = table_of(info.annotation)
        if kind is None:
            yield f"{prefix}{name}"
        elif not named:  # a key below a name of the user's choice has no short one
            yield from _keys(kind, f"{prefix}{name}.")


def _split(text: str) -> Iterator[str]:
    """Parts between commas that stand in no bracket and no quotes."""
    depth, quote, part = 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and not depth and not quote:
            yield part
            part = ""
        else:
            part += character
    yield part


def _expand(part: str) -> Iterator[str]:
    found = _RANGE.fullmatch(part)
    if found is None:
        yield part
        return
    first, last = int(found[1]), int(found[2])
    if last - first >= MAX_CELLS:
        raise LimitExceededError(
            f"--grid: the range {part} is of {last - first + 1} numbers, limit MAX_CELLS is {MAX_CELLS}"
        )
    yield from (str(number) for number in range(first, last + 1))
