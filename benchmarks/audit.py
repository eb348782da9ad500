"""What `fedlearn audit` says of honest builds and of builds with a defect planted in their noise, and how long it takes.

1,000 canaries, a claim of epsilon = 1, 95 % confidence, no membership test. Honest builds are audited under several seeds: the share of them that
is refuted is at most one in twenty.

    python -m benchmarks.audit [--seeds N] [--write]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedlearn.privacy.mechanisms import Chance
from fedlearn.simulation.audit import audit
from fedlearn.simulation.prepare import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results" / "audit.md"
FACTORS = (1.0, 0.5, 0.3, 0.1, 0.0)
ONE = ("privacy.epsilon=1", "privacy.delta=1e-5")
STUDIES = {
    "heart, records": ("simulations/heart.toml", "privacy.unit=record"),
    "heart, clients": ("simulations/heart.toml", "privacy.unit=client", "privacy.units=4", "rounds=5"),
}


@dataclass(frozen=True)
class Row:
    """One build of one study, audited under several seeds."""

    study: str
    factor: float
    bound: float
    refuted: int
    short: int
    audits: int
    cpu_s: float


@contextmanager
def planted(factor: float) -> Iterator[None]:
    """All noise of this process is `factor` times what was asked for."""
    honest = Chance.add_normals

    def add_normals(self: Chance, to: Sequence[Any], std: float) -> None:
        honest(self, to, std * factor)

    Chance.add_normals = add_normals  # type: ignore[method-assign]  # that is the defect
    try:
        yield
    finally:
        Chance.add_normals = honest  # type: ignore[method-assign]


def measure(name: str, factor: float, seeds: int) -> Row:
    """Audit one build."""
    study, *overrides = STUDIES[name]
    bounds, refuted, short = [], 0, 0
    started = time.process_time()
    for seed in range(seeds):
        ready = Request(study, overrides=(*overrides, *ONE, f"seed={seed}")).ready()
        with planted(factor):
            report = audit(ready, shadows=0)
        bounds.append(report.finding.epsilon_lower)
        refuted += report.finding.refuted
        short += bool(report.short_of_noise)
    return Row(name, factor, median(bounds), refuted, short, seeds, (time.process_time() - started) / seeds)


def main() -> int:
    """Measure, print, and keep the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/")
    asked = parser.parse_args()
    lines = [
        "# What the audit says of honest builds and of planted ones",
        "",
        f"`python -m benchmarks.audit --seeds {asked.seeds} --write`: 1,000 canaries, claim epsilon <= 1 at delta 1e-5, 95 % confidence. The bound",
        "is the median over seeds. Refuted: by the guesses at who was in. Short of noise: an array has measurably less than planned.",
        "",
        "| study | noise | epsilon >= | refuted | short of noise | CPU seconds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name in STUDIES:
        for factor in FACTORS:
            row = measure(name, factor, asked.seeds)
            noise = {1.0: "honest", 0.0: "none"}.get(factor, f"x {factor:g}")
            lines.append(
                f"| {name} | {noise} | {row.bound:.2f} | {row.refuted} of {row.audits} | {row.short} of {row.audits} | {row.cpu_s:.1f} |"
            )
            print(lines[-1], flush=True)
    if asked.write:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
