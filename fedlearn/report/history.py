"""A run's history as a table: for a notebook, a terminal, a spreadsheet and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedlearn.errors import DataError

MAX_CLIENT_COLUMNS: Final = 1_000
"""Of more clients than this none has a column of its own: a population that is drawn from anew each round would have millions."""
_COLUMNS: Final = ("round", "clients", "dropped", "attempt", "seconds", "train_loss", "update_norm")


class History(Sequence[Mapping[str, Any]]):
    """One row a round.

    Columns are what the round's record holds, `metrics` flattened to one column each, and `METRIC@CLIENT` for the primary metric of
    each client, as long as these are at most `MAX_CLIENT_COLUMNS`. A round without an evaluation has None there.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
        self.metric = metric
        clients = {client for row in rows for client in row.get("clients_metrics", {})}
        self._rows = [_flatten(row, metric, by_client=len(clients) <= MAX_CLIENT_COLUMNS) for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @property
    def columns(self) -> tuple[str, ...]:
        """Column names, in order of appearance."""
        names = dict.fromkeys(_COLUMNS)
        for row in self._rows:
            names.update(dict.fromkeys(row))
        return tuple(names)

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients with an evaluation of their own."""
        prefix = f"{self.metric}@"
        return tuple(name.removeprefix(prefix) for name in self.columns if name.startswith(prefix))

    def has(self, name: str) -> bool:
        """Whether any row has a value in a column."""
        return any(value == value for row in self._rows if (value := row.get(name)) is not None)  # noqa: PLR0124  # NaN is none

    def column(self, name: str) -> list[Any]:
        """One column; None where a row has no such value.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.columns:
            raise DataError(f"history: no column {name!r}; it has {', '.join(self.columns)}")
        return [row.get(name) for row in self._rows]

    def final(self, name: str | None = None) -> float:
        """The last value of a metric (the primary one by default); NaN when it was never evaluated."""
        values = [v for row in self._rows if (v := row.get(name or self.metric)) is not None]
        return float(values[-1]) if values else math.nan

    def to_json(self) -> str:
        """A JSON list of rows."""
        return json.dumps(self._rows, indent=1)

    def to_csv(self) -> str:
        """CSV with a header."""
        out = io.StringIO()
        writer = csv.DictWriter(out, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return out.getvalue()

    def to_pandas(self) -> Any:
        """A pandas DataFrame; pandas is not one of fedlearn's own dependencies."""
        import pandas as pd

        return pd.DataFrame(self._rows, columns=list(self.columns))

    def plot(self, path: Path | str | None = None, *, title: str = "") -> Any:
        """The learning curve as a matplotlib figure: the primary metric by round, a thin line a client; the loss below."""
        from fedlearn.report.curves import learning_curve

        return learning_curve(self, None if path is None else Path(path), title)

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        names = self._shown()
        head = "".join(f"<th>{name}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{_cell(row.get(n))}</td>" for n in names) + "</tr>" for row in self._rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _shown(self) -> tuple[str, ...]:
        return tuple(n for n in self.columns if "@" not in n and n not in {"attempt", "dropped"})

    def _lines(self) -> Iterator[str]:
        names = self._shown()
        cells = [names, *(tuple(_cell(row.get(n)) for n in names) for row in self._rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _flatten(row: Mapping[str, Any], metric: str, *, by_client: bool) -> dict[str, Any]:
    flat = {key: value for key, value in row.items() if key not in {"metrics", "clients_metrics"}}
    flat.update({name: value for name, value in row.get("metrics", {}).items() if name not in flat})
    for client, metrics in row.get("clients_metrics", {}).items() if by_client else ():
        flat[f"{metric}@{client}"] = metrics.get(metric)
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
