"""docs/strategies.md lists exactly the registry, with its papers, options and releases."""

from __future__ import annotations

import re
from pathlib import Path

import strategies
from strategies.options import shown

PAGE = Path(__file__).parents[3] / "docs" / "strategies.md"


def _rows() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("| name | paper |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_the_table_is_the_registry() -> None:
    expected = []
    for name in strategies.names():
        card = strategies.describe(name)
        options = ", ".join(f"`{o.name}` = {shown(o.default)}" for o in card.options) or "-"
        takes = "sum" if card.linear else "stack"
        expected.append([f"`{name}`", card.paper, options, ", ".join(card.releases), takes])
    assert [[row[0], row[1], row[3], row[4], row[5]] for row in _rows()] == expected


def test_only_sums_are_said_to_fit() -> None:
    for row in _rows():
        linear = strategies.describe(row[0].strip("`")).linear
        assert len(row) == 8
        assert all(cell.startswith("fits" if linear else "no:") for cell in row[6:])


def test_the_page_names_every_strategy_with_a_least_number_of_clients() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Fewest clients")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    assert named == {name for name in strategies.names() if strategies.create(name).min_clients > 1}
