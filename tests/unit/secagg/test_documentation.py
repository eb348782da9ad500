"""The page's example runs, and its table of thresholds is the program's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedlearn.secagg.floor import honest_floor
from fedlearn.secagg.graph import parameters
from fedlearn.secagg.plan import Profile

PAGE = (Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys):
    plain, noisy = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(plain, names)
    assert re.match(r"750 \[0\.(1|09999)", capsys.readouterr().out), "rounded by chance"
    assert np.allclose(names["total"].mean(), 0.1, atol=1e-6)
    exec(noisy, names)
    assert capsys.readouterr().out.startswith("4 4.9")
    assert np.abs(names["result"].values - 0.4).max() < 6 * names["result"].noise_deviation


def test_the_table_of_honest_floors():
    rows = {
        name: [int(cell.replace(",", "")) for cell in cells.strip("|").split("|")]
        for name, cells in re.findall(r"^\| ([a-z][-a-z 0-9,%]+) \|([ 0-9|,]+)\|$", PAGE, re.MULTILINE)
    }
    sizes = list(zip(rows["clients, 10 % colluding"], rows["fewest survivors in the plan"], strict=True))
    for profile in Profile:
        name = f"honest floor, {profile.name.lower().replace('_', '-')} profile"
        assert rows[name] == [honest_floor(n, least, 0.1, 0.1, profile) for n, least in sizes]


def test_the_table_of_thresholds():
    rows = {
        cells[0].strip(): [int(c) for c in cells[1:]]
        for line in PAGE.splitlines()
        if re.fullmatch(r"\| (clients|may collude \(a\)|open a mask \(t\)|may drop out) \|[ 0-9|]+\|", line)
        for cells in [line.strip("|").split("|")]
    }
    found = [parameters(n, 100_000, 0) for n in rows["clients"]]
    assert rows["may collude (a)"] == [p.adversarial for p in found]
    assert rows["open a mask (t)"] == [p.threshold for p in found]
    assert rows["may drop out"] == [p.holders - p.threshold for p in found]
