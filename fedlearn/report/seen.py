"""What a coordinator saw of one client under masks, beside what it read of all: a table of numbers, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlearn.events import SumOpened

SHOWN = 6


def lines(opened: SumOpened, clients: int) -> list[str]:
    """For a terminal.

    Args:
        opened: a round's.
        clients: how many updates are in its mean.
    """
    seen = "  ".join(f"{element:>10}" for element in opened.masked[:SHOWN])
    read = "  ".join(f"{number:>+10.4f}" for number in opened.mean[:SHOWN])
    return [
        f"of {opened.client} alone, masked:   {seen} ...",
        f"the mean of {clients}, unmasked:{'':>{max(1, len(opened.client) - len(str(clients)) - 1)}}{read} ...",
        f"The first is uniform on 0 to 2^{opened.ring_bits} - 1, whatever the update was: only the sum means anything.",
    ]


def plot(opened: SumOpened, clients: int, path: Path | None = None) -> Any:
    """Both vectors' first numbers as bars, as a matplotlib figure; saved as PNG where a path is given."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(len(opened.masked)), np.array(opened.masked) / 2**opened.ring_bits, color="#9aa5b1", width=1.0)
    left.set_title(f"What the coordinator saw of {opened.client}", loc="left", fontsize=11)
    left.set_ylabel(f"masked number / 2^{opened.ring_bits}")
    left.set_ylim(0, 1)
    right.bar(np.arange(len(opened.mean)), opened.mean, color="#1f6feb", width=1.0)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_title(f"What it read: the mean of {clients} updates", loc="left", fontsize=11)
    right.set_ylabel("mean update")
    for axes in (left, right):
        axes.set_xlabel("parameter")
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
