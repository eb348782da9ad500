"""CSV files read strictly: every refusal names the file, the column and the line, what was got and what was expected."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import DataError

FloatArray = npt.NDArray[np.float64]

MISSING: Final = frozenset({"", "?", "na", "nan", "null", "none"})
"""Cells that mean "not recorded", in lower case. "?" is UCI's."""

MAX_ROWS: Final = 50_000_000
FIRST_LINE: Final = 2
"""The line of the first row: line 1 is the header."""


@dataclass(frozen=True)
class Table:
    """A CSV file as text.

    Args:
        path: where it was read, for messages.
        columns: column name to its cells, stripped, all of one length.
    """

    path: Path
    columns: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def numbers(self, column: str, *, low: float = -np.inf, high: float = np.inf, required: bool = False) -> FloatArray:
        """One column as float64, NaN where it is missing.

        Raises:
            DataError: a cell is not a number, is out of range, or is missing where `required`.
        """
        expected = "a number" if np.isinf(low) and np.isinf(high) else f"a number from {low:g} to {high:g}"
        out = np.full(len(self), np.nan)
        for row, cell in enumerate(self.columns[column]):
            if cell.lower() in MISSING:
                if required:
                    raise self._refusal(column, row, cell, expected + ", never missing")
                continue
            try:
                value = float(cell)
            except ValueError:
                raise self._refusal(column, row, cell, expected) from None
            if not low <= value <= high or np.isinf(value):
                raise self._refusal(column, row, cell, expected)
            out[row] = value
        return out

    def codes(self, column: str, levels: Sequence[str], *, required: bool = False) -> FloatArray:
        """One categorical column as the index of its level (compared without case), NaN where it is missing."""
        index = {level.lower(): float(code) for code, level in enumerate(levels)}
        out = np.full(len(self), np.nan)
        for row, cell in enumerate(self.columns[column]):
            key = cell.lower()
            if key in index:
                out[row] = index[key]
            elif key not in MISSING or required:
                raise self._refusal(column, row, cell, "one of " + ", ".join(map(repr, levels)))
        return out

    def text(self, column: str) -> npt.NDArray[np.str_]:
        """One column as text; an empty cell is refused."""
        for row, cell in enumerate(self.columns[column]):
            if not cell:
                raise self._refusal(column, row, cell, "some text")
        return np.array(self.columns[column], dtype=np.str_)

    def _refusal(self, column: str, row: int, cell: str, expected: str) -> DataError:
        got = repr(cell) if cell else "an empty cell"
        return DataError(f"{self.path}: column {column!r}, line {row + FIRST_LINE}: got {got}, expected {expected}")


def read_table(path: Path, required: Sequence[str], *, keep_others: bool = False) -> Table:
    """Read a CSV file with a header line; UTF-8, comma-separated.

    Args:
        path: the file.
        required: columns that must be there.
        keep_others: keep the other columns too, so that the caller can look for optional ones.

    Raises:
        DataError: no such file, not a CSV, a column is missing, a row is longer or shorter than the header, no rows.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, required)
            cells: list[list[str]] = [[] for _ in header]
            for number, row in enumerate(reader):
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num}: got {len(row)} cells, expected {len(header)} as in the header"
                    )
                if number >= MAX_ROWS:
                    raise DataError(f"{path}: more than {MAX_ROWS} rows")
                for column, cell in zip(cells, row, strict=True):
                    column.append(cell.strip())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a CSV file", hint="check the path given as the data") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV file in UTF-8: {error}") from None
    if not cells or not cells[0]:
        raise DataError(f"{path}: got a header and no rows, expected at least one row")
    wanted = set(header) if keep_others else set(required)
    return Table(path, {name: column for name, column in zip(header, cells, strict=True) if name in wanted})


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
