"""CSV files read by a schema: what does not fit it is named by file, column and line, with what was got and what was expected.

A file that cannot be read, or lacks a column, is refused. A row that does not fit is noted and left out of `Table.examples`: whether that is a reason
to refuse is the caller's to say (see `fedlearn.learning.task.Examples.whole`).
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import DataError
from fedlearn.learning.rows import IntArray
from fedlearn.learning.task import Examples, LeftOut

FloatArray = npt.NDArray[np.float64]

MISSING: Final = frozenset({"", "?", "na", "nan", "null", "none"})
"""Cells that mean "not recorded", in lower case. "?" is UCI's."""

MAX_ROWS: Final = 50_000_000


@dataclass(frozen=True)
class Table:
    """A CSV file as text.

    Args:
        path: where it was read, for messages.
        columns: column name to its cells, stripped, all of one length.
        lines: the file's line of each row, from 1.
        broken: what is wrong with lines that are no rows.
    """

    path: Path
    columns: Mapping[str, Sequence[str]]
    lines: Sequence[int]
    broken: Sequence[DataError] = ()
    _faults: dict[int, DataError] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.lines)

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def numbers(self, column: str, *, low: float = -np.inf, high: float = np.inf, required: bool = False) -> FloatArray:
        """One column as float64, NaN where it is missing.

        A row does not fit whose cell is not a number, is out of range, or is missing where `required`; it has NaN too, or 0 where `required`.
        """
        expected = "a number" if np.isinf(low) and np.isinf(high) else f"a number from {low:g} to {high:g}"
        out = np.full(len(self), 0.0 if required else np.nan)
        for row, cell in enumerate(self.columns[column]):
            if cell.lower() in MISSING:
                if required:
                    self._note(column, row, cell, expected + ", never missing")
                continue
            try:
                value = float(cell)
            except ValueError:
                value = np.nan
            if low <= value <= high and not np.isinf(value):
                out[row] = value
            else:
                self._note(column, row, cell, expected)
        return out

    def codes(self, column: str, levels: Sequence[str], *, required: bool = False) -> FloatArray:
        """One categorical column as the index of its level (compared without case), NaN where it is missing; otherwise as `numbers`."""
        index = {level.lower(): float(code) for code, level in enumerate(levels)}
        out = np.full(len(self), 0.0 if required else np.nan)
        for row, cell in enumerate(self.columns[column]):
            key = cell.lower()
            if key in index:
                out[row] = index[key]
            elif key not in MISSING or required:
                self._note(column, row, cell, "one of " + ", ".join(map(repr, levels)))
        return out

    def text(self, column: str) -> npt.NDArray[np.str_]:
        """One column as text; a row with an empty cell does not fit."""
        for row, cell in enumerate(self.columns[column]):
            if not cell:
                self._note(column, row, cell, "some text")
        return np.array(self.columns[column], dtype=np.str_)

    @property
    def fits(self) -> IntArray:
        """Rows that fit in every column that was asked for so far, int64, ascending."""
        good = np.ones(len(self), dtype=np.bool_)
        good[list(self._faults)] = False
        return np.flatnonzero(good).astype(np.int64)

    @property
    def left_out(self) -> LeftOut | None:
        """The other rows; None where all fit, and there are any."""
        errors = [*self.broken, *self._faults.values()]
        if not errors and not len(self):
            return LeftOut(0, DataError(f"{self.path}: got a header and no rows, expected at least one row"))
        return LeftOut(len(errors), errors[0]) if errors else None

    def examples(
        self,
        x: npt.NDArray[Any],
        y: npt.NDArray[Any],
        client: npt.NDArray[np.str_] | None = None,
        groups: npt.NDArray[np.str_] | None = None,
    ) -> Examples:
        """The rows that fit, of what was made of all rows."""
        return replace(Examples(x, y, client, groups).take(self.fits), left_out=self.left_out)

    def _note(self, column: str, row: int, cell: str, expected: str) -> None:
        """What is first found wrong with a row."""
        if row not in self._faults:
            got = repr(cell) if cell else "an empty cell"
            where = f"{self.path}: column {column!r}, line {self.lines[row]}"
            self._faults[row] = DataError(f"{where}: got {got}, expected {expected}")


def read_table(path: Path, required: Sequence[str], *, keep_others: bool = False) -> Table:
    """Read a CSV file with a header line; UTF-8, comma-separated.

    Args:
        path: the file.
        required: columns that must be there.
        keep_others: keep the other columns too, so that the caller can look for optional ones.

    Raises:
        DataError: no such file, not a CSV, a column is missing.
    """
    lines: list[int] = []
    broken: list[DataError] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, required)
            cells: list[list[str]] = [[] for _ in header]
            for row in reader:
                if not row:
                    continue
                if len(lines) + len(broken) >= MAX_ROWS:
                    raise DataError(f"{path}: more than {MAX_ROWS} rows")
                if len(row) != len(header):
                    got = f"got {len(row)} cells, expected {len(header)} as in the header"
                    broken.append(DataError(f"{path}: line {reader.line_num}: {got}"))
                    continue
                lines.append(reader.line_num)
                for column, cell in zip(cells, row, strict=True):
                    column.append(cell.strip())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a CSV file", hint="check the path given as the data") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV file in UTF-8: {error}") from None
    wanted = set(header) if keep_others else set(required)
    return Table(
        path, {name: column for name, column in zip(header, cells, strict=True) if name in wanted}, lines, broken
    )


def _check_header(path: Path, header: Sequence[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        near = {name: difflib.get_close_matches(name, header, n=1) for name in missing}
        guess = "; ".join(f"{name!r} may be {match[0]!r} here" for name, match in near.items() if match)
        raise DataError(
            f"{path}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; "
            f"got {', '.join(map(repr, header[:40])) or 'an empty file'}",
            hint=guess or f"expected the columns {', '.join(required)}",
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} appears more than once, expected each column once")
