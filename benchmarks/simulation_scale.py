"""What a simulated round costs as the population, the cohort and the model grow: one core, each size in a process of its own.

Clients are drawn when they are asked for (the bootstrap partition): 64 examples of 30 features each, W2's training.

    python -m benchmarks.simulation_scale [--axes population,cohort,model] [--rounds 4] [--write]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WARM_UP = 1
MOST_MB = 1500


@dataclass(frozen=True)
class Size:
    """One point.

    Args:
        population: clients of the study.
        cohort: clients a round.
        hidden: widths of the model's hidden layers.
    """

    population: int = 100_000
    cohort: int = 200
    hidden: tuple[int, ...] = (64, 32)

    @property
    def parameters(self) -> int:
        widths = (30, *self.hidden, 2)
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))


AXES = {
    "population": [Size(population=n) for n in (1_000, 10_000, 100_000, 1_000_000)],
    "cohort": [Size(cohort=n) for n in (10, 100, 1_000, 10_000)],
    "model": [Size(cohort=100, hidden=h) for h in ((64, 32), (256, 128), (1024, 512), (4096, 1024))],
    "million": [Size(population=1_000_000, cohort=1_000)],
}
VALUE = {"population": lambda s: s.population, "cohort": lambda s: s.cohort, "model": lambda s: s.parameters}


def one(size: Size, rounds: int) -> dict:
    """In this process: seconds from its start to the end of the first round, CPU seconds of the others, and memory."""
    import fedlearn
    from benchmarks.watch import Watch, status_mb
    from benchmarks.workloads import SEED
    from fedlearn import events
    from fedlearn.study import Study

    watch = Watch()
    started = []

    def take(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            started.append(time.process_time())
        if isinstance(event, events.RoundFinished):
            watch.lap()

    study = Study.model_validate(
        {
            "name": "scale",
            "seed": SEED,
            "rounds": rounds,
            "task": {"name": "benchmarks.workloads:Rows", "options": {"clients": 200, "hidden": list(size.hidden)}},
            "data": {
                "partition": "bootstrap",
                "clients": size.population,
                "folds": 1,
                "options": {"examples_per_client": 64},
            },
            "train": {"lr": 0.1, "batch_size": 16},
            "cohort": {"size": size.cohort},
            "evaluate": {"every": 0},
        }
    )
    fedlearn.simulate(study, emit=take, backend="batched")
    return {
        "start_s": started[0],
        "first_s": started[0] + watch.cpu_s[0],
        "cpu_s": statistics.median(watch.cpu_s[WARM_UP:]),
        "peak_mb": status_mb("VmHWM"),
        "growth_mb": watch.resident_mb[-1] - watch.resident_mb[0],
    }


def measure(size: Size, rounds: int, core: int) -> dict:
    command = ["taskset", "-c", str(core), sys.executable, "-m", "benchmarks.simulation_scale"]
    text = json.dumps(asdict(size))
    done = subprocess.run(
        [*command, "--one", text, "--rounds", str(rounds)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{text} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{text}: {found}", file=sys.stderr, flush=True)
    return found


def table(axis: str, points: list[tuple[Size, dict]]) -> list[str]:
    lines = [
        f"### {axis.capitalize()}",
        "",
        "| population | cohort | parameters | start, CPU s | first round done, CPU s | CPU s per round | clients/s | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, found in points:
        lines.append(
            f"| {size.population:,} | {size.cohort:,} | {size.parameters:,} | {found['start_s']:.1f} | {found['first_s']:.1f} | "
            f"{found['cpu_s']:.4f} | {size.cohort / found['cpu_s']:,.0f} | {found['peak_mb']:.0f} MB |"
        )
    return [*lines, ""]


def figure(found: dict[str, list[tuple[Size, dict]]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = [axis for axis in VALUE if axis in found]
    sheet = Figure(figsize=(4 * len(axes), 5), layout="constrained")
    for column, axis in enumerate(axes):
        x = [VALUE[axis](size) for size, _ in found[axis]]
        for row, (key, label, colour) in enumerate(
            (("cpu_s", "CPU s per round", "#1f6feb"), ("peak_mb", "peak memory, MB", "#d9a441"))
        ):
            panel = sheet.add_subplot(2, len(axes), row * len(axes) + column + 1)
            panel.plot(x, [point[key] for _, point in found[axis]], "o-", color=colour)
            panel.set_xscale("log")
            panel.set_xlabel("parameters" if axis == "model" else axis)
            panel.set_ylabel(label)
            highest = max(point[key] for points in found.values() for _, point in points)
            if key == "cpu_s":
                panel.set_yscale("log")
                panel.set_ylim(1e-3, 2 * highest)
            else:
                panel.set_ylim(0, 1.1 * highest)
            panel.spines[["top", "right"]].set_visible(False)
    sheet.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", type=lambda t: t.split(","), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/simulation_scale.md and .png")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        size = json.loads(arguments.one)
        print(json.dumps(one(Size(**size | {"hidden": tuple(size["hidden"])}), arguments.rounds)))
        return 0
    found = {a: [(s, measure(s, arguments.rounds, arguments.core)) for s in AXES[a]] for a in arguments.axes}
    most = max((p["peak_mb"] for points in found.values() for s, p in points if s.population == 1_000_000), default=0.0)
    held = most <= MOST_MB
    text = "\n".join(
        [
            "# The simulator: cost against population, cohort and model",
            "",
            (
                f"`python -m benchmarks.simulation_scale`: one pinned core of a {os.cpu_count()}-core {platform.machine()} VM that other"
                f" work shares; medians of {arguments.rounds - WARM_UP} rounds after {WARM_UP}. Clients of 64 examples are drawn when they are"
                " asked for. CPU time counts from the start of the process, imports included."
            ),
            "",
            *(line for axis, points in found.items() for line in table(axis, points)),
            "![cost](simulation_scale.png)",
            "",
            *(
                [
                    f"- 1,000,000 clients: peak {most:.0f} MB, target {MOST_MB} MB: **{'holds' if held else 'does not hold'}**",
                    "",
                ]
                if most
                else []
            ),
        ]
    )
    print(text)
    if arguments.write:
        (RESULTS / "simulation_scale.md").write_text(text, encoding="utf-8")
        figure(found, RESULTS / "simulation_scale.png")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
