"""How commands print: text and aligned tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """One JSON document; NaN and infinities, which JSON does not have, become null."""
    print(json.dumps(_plain(value), indent=2, default=str))


def print_table(
    rows: Sequence[Sequence[Any]], header: Sequence[str], indent: str = "", right: Sequence[int] = ()
) -> None:
    """Aligned columns: text to the left, numbers and the columns named in `right` to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [
        i in right or (all(isinstance(row[i], int | float) or row[i] is None for row in rows) and bool(rows))
        for i in range(len(header))
    ]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    for line in [list(header), *cells]:
        parts = [c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True)]
        print((indent + "  ".join(parts)).rstrip())


def cell(value: Any) -> str:
    """One value as it stands in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
