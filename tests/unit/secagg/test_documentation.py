"""The page's example runs, and its table of thresholds is the program's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fedlearn.secagg.graph import parameters

PAGE = (Path(__file__).parents[3] / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.startswith("750 [0.1")
    assert np.allclose(names["total"].mean(), 0.1, atol=1e-6)


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
