"""When clients were there, as somebody recorded it: a CSV with the columns client, from_s and until_s."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import DataError
from fedlearn.learning.rows import IntArray, ListedIds

COLUMNS: Final = ("client", "from_s", "until_s")
MAX_BYTES: Final = 256 * 1024 * 1024
MAX_INTERVALS: Final = 5_000_000


@dataclass(frozen=True)
class Trace:
    """Intervals of presence.

    Args:
        ids: the devices that were recorded.
        starts: when each interval begins, seconds, device after device, ascending within each; shape (intervals,).
        ends: when each ends; shape (intervals,).
        offsets: where each device's intervals begin; shape (devices + 1,).
        period_s: the end of the last one: after it the trace begins again.
        keys: device * period + start of each interval, ascending: one search finds the intervals of many devices.
    """

    ids: ListedIds
    starts: npt.NDArray[np.float64] = field(repr=False)
    ends: npt.NDArray[np.float64] = field(repr=False)
    offsets: IntArray = field(repr=False)
    period_s: float
    keys: npt.NDArray[np.float64] = field(repr=False)

    def present(self, devices: IntArray, time_s: npt.NDArray[np.float64] | float) -> npt.NDArray[np.bool_]:
        """Whether each of these devices, by its place among `ids`, is there."""
        at = np.mod(np.broadcast_to(time_s, devices.shape), self.period_s)
        last = np.searchsorted(self.keys, devices * self.period_s + at, side="right") - 1
        mine = last >= self.offsets[devices]
        there: npt.NDArray[np.bool_] = mine & (at < self.ends[np.maximum(last, 0)])
        return there


def read_trace(path: Path | str) -> Trace:
    """Read and check a trace.

    Raises:
        DataError: the file is missing, too large, or a row is not an interval; the message names its line.
    """
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, limit MAX_BYTES of a trace is {MAX_BYTES}")
        with path.open(newline="", encoding="utf-8") as file:
            rows = _rows(csv.DictReader(file), path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a trace: {error}") from None
    if not rows:
        raise DataError(f"{path}: no intervals; expected at least one row")
    rows.sort()
    names = [name for name, _, _ in rows]
    ids = ListedIds(tuple(dict.fromkeys(names)))
    starts, ends = (np.array([row[i] for row in rows], dtype=np.float64) for i in (1, 2))
    owner = np.array([ids.number(name) for name in names])
    for line in np.flatnonzero((owner[1:] == owner[:-1]) & (starts[1:] < ends[:-1]))[:1].tolist():
        raise DataError(f"{path}: two intervals of client {names[line]!r} overlap at {starts[line + 1]:g} s")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner))])
    period_s = float(ends.max())
    return Trace(ids, starts, ends, offsets, period_s, owner * period_s + starts)


def _rows(reader: csv.DictReader[str], path: Path) -> list[tuple[str, float, float]]:
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; expected {', '.join(COLUMNS)}")
    rows: list[tuple[str, float, float]] = []
    for row in reader:
        if len(rows) == MAX_INTERVALS:
            raise DataError(f"{path}: more than {MAX_INTERVALS} intervals, limit MAX_INTERVALS of a trace")
        try:
            name, start, end = row["client"], float(row["from_s"]), float(row["until_s"])
        except (TypeError, ValueError):
            raise DataError(f"{path}:{reader.line_num}: from_s and until_s are not both numbers") from None
        if not (name and 0 <= start < end < float("inf")):
            raise DataError(
                f"{path}:{reader.line_num}: got {name!r} from {start:g} to {end:g}, expected a client, 0 <= from_s < until_s"
            )
        rows.append((name, start, end))
    return rows
