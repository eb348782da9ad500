"""The simulator beside Apple's pfl, Flower's simulator, Opacus and a careful hand-written loop: CPU seconds per round on one core.

Every contender runs the same workload in a process of its own, pinned to one core, one after the other and in turns, from the same
initial weights, on the same data, clients and batches. Without noise their final weights must agree. The workloads are described in
`benchmarks/workloads.py`.

    python -m benchmarks.simulation [--workloads W1,W2,W3,W3b] [--peers pfl,loop,opacus] [--write]

Peers that are not part of fedlearn's environment are named by a Python that has them, or by a folder:

    pip install --no-deps --target /opt/peers/pfl pfl==0.6.0 multiprocess dill prv_accountant   ->  --pfl-path /opt/peers/pfl
    python -m venv /opt/peers/flower, then pip install 'flwr[simulation]==1.41.*' and fedlearn    ->  --flower-python /opt/peers/flower/bin/python
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
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "simulation.md"
TARGETS = {
    ("W1", "pfl"): 1.8,
    ("W2", "pfl"): 25,
    ("W3", "pfl"): 25,
    ("W3b", "opacus"): 60,
    ("W2", "flower1000"): 300,
}
PEERS = {
    "W1": ("sequential", "loop", "pfl", "pfl+loss", "pfl:fedprox", "pfl:scaffold"),
    "W2": ("sequential", "loop", "pfl", "pfl+loss", "flower200", "flower1000"),
    "W3": ("sequential", "loop", "pfl", "pfl+loss"),
    "W3b": ("sequential", "opacus"),
}
ROUNDS = {"W1": 3, "W2": 12, "W3": 12, "W3b": 4}
SLOW = {"flower200": 3, "flower1000": 2, "opacus": 3}
WARM_UP = 1
RULES = {"W1": ("fedprox", "scaffold")}
RULE_TARGET = 1.3
AGREE = 1e-4
APART = 3.0
"""Or so many times what two peers are apart: with ReLU and max pooling a last bit decides, now and then, which way a gradient goes."""
FIRST_RESULT_S = 4.0
PEAK_MB = {"W1": 600}
NOTE = {
    "W3": "Ours is a study with [privacy] for clients: clipped in the blocks, noise on the exact sum, the round's plan and journal included",
    "W3b": "Ours is a study with [privacy] for records: real Poisson batches, 16 examples on average; Opacus here has batches of exactly 16",
}


@dataclass
class Score:
    """One contender on one workload.

    Args:
        cpu_s: of each round after the warm-up, all turns.
        peak_mb: the largest of its processes' peaks.
        growth_mb: resident memory after the last round less that after the second.
        weights: where the final ones are.
    """

    cpu_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    growth_mb: float = 0.0
    weights: Path | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.cpu_s)


class Runner:
    """Starts contenders."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder

    def missing(self, contender: str) -> str:
        """What a person should do to have this contender; empty when it is there."""
        check, how = {
            "pfl": ("import pfl.privacy", "see --pfl-path"),
            "opacus": ("import opacus", "pip install opacus"),
            "flower": ("import ray, flwr, torch, fedlearn", "see --flower-python"),
        }.get(contender, ("", ""))
        if not check or self._start([*self._python(contender), "-c", check], contender).returncode == 0:
            return ""
        return f"{contender}: not installed; {how} (python -m benchmarks.simulation --help)"

    def run(self, contender: str, workload: str, rounds: int, *, quiet: bool = False) -> tuple[dict, Path]:
        out = self._folder / f"{contender}-{workload}-{quiet}.npz"
        command = [*self._python(contender), "-m", "benchmarks.simulation_peers", contender, workload]
        done = self._start([*command, "--rounds", str(rounds), "--out", str(out), *(["--quiet"] * quiet)], contender)
        if done.returncode != 0:
            raise SystemExit(f"{contender} on {workload} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1]), out

    def _python(self, contender: str) -> list[str]:
        python = self._arguments.flower_python if contender.startswith("flower") else sys.executable
        return ["taskset", "-c", str(self._arguments.core), python]

    def _start(self, command: list[str], contender: str) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), *([self._arguments.pfl_path] if contender.startswith("pfl") else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def _family(contender: str) -> str:
    """`flower` of flower1000, `pfl` of pfl+loss and pfl:scaffold."""
    return contender.rstrip("0123456789").partition("+")[0].partition(":")[0]


def measure(runner: Runner, workload: str, contenders: list[str], turns: int) -> dict[str, Score]:
    """All contenders in turns, so that a busy minute of the machine meets them all."""
    scores = {c: Score() for c in contenders}
    for turn in range(turns):
        for contender, score in scores.items():
            if contender in SLOW and turn > 0:
                continue
            rounds = WARM_UP + min(ROUNDS[workload], SLOW.get(contender, ROUNDS[workload]))
            found, _ = runner.run(contender, workload, rounds)
            score.cpu_s += found["cpu_s"][WARM_UP:]
            score.peak_mb = max(score.peak_mb, found["peak_mb"])
            score.growth_mb = max(score.growth_mb, found["resident_mb"][-1] - found["resident_mb"][1])
            print(f"{workload} {contender}: {score.median_s:.4f} CPU s per round", file=sys.stderr, flush=True)
    return scores


def disagreement(runner: Runner, workload: str, contenders: list[str], rounds: int) -> dict[str, float]:
    """The largest norm(a - b) / norm(a) over the tensors of two contenders' final weights, without noise: ours, and the peers' own."""
    import numpy as np

    weights = {}
    for contender in ("ours", *contenders):
        _, path = runner.run(contender, workload, rounds, quiet=True)
        with np.load(path) as file:
            weights[contender] = {name: file[name] for name in file.files}

    def apart(one: dict, other: dict) -> float:
        return max(float(np.linalg.norm(one[n] - other[n]) / np.linalg.norm(one[n])) for n in one)

    found = {contender: apart(weights["ours"], weights[contender]) for contender in contenders}
    peers = [apart(weights[a], weights[b]) for a, b in itertools.combinations(contenders, 2)]
    return found | {"each other": max(peers, default=0.0)}


def first_result(core: int) -> list[tuple[float, float]]:
    """Wall and CPU seconds of `fedlearn simulate` on W2 up to its first round's row, three times; imports included."""
    from benchmarks.watch import cpu_s_of
    from benchmarks.workloads import WORKLOADS

    seconds = []
    with tempfile.TemporaryDirectory() as name:
        study = Path(name) / "w2.toml"
        study.write_text(_toml(WORKLOADS["W2"].study(2).model_dump(exclude_defaults=True)), encoding="utf-8")
        for turn in range(3):
            command = ["taskset", "-c", str(core), sys.executable, "-u", "-m", "fedlearn.cli", "simulate", str(study)]
            began = time.monotonic()
            with subprocess.Popen(
                [*command, "--out", f"{name}/{turn}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip().startswith("1 "):
                        seconds.append((time.monotonic() - began, cpu_s_of(process.pid)))
                        break
                process.stdout.read()
            assert process.returncode == 0
            assert len(seconds) == turn + 1, "no row of round 1"
    return seconds


def _toml(tree: dict, path: str = "") -> str:
    plain = {k: v for k, v in tree.items() if not isinstance(v, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in plain.items()]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += [f"[{path}{key}]", _toml(value, f"{path}{key}.")]
    return "\n".join(lines)


def table(workload: str, scores: dict[str, Score], limit_gflops: float) -> list[str]:
    from benchmarks.workloads import WORKLOADS

    load = WORKLOADS[workload]
    limit_s = load.flops / limit_gflops / 1e9
    lines = [
        f"### {workload}: {load.cohort} clients a round, {load.flops / 1e9:.2f} GFLOP",
        "",
        "| | CPU s per round | ours is faster by | target | clients/s | share of the sgemm limit | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender, score in scores.items():
        ours = scores["ours"].median_s if "ours" in scores else None
        faster = (
            "" if contender.startswith("ours") or ":" in contender or ours is None else f"{score.median_s / ours:.1f}x"
        )
        target = TARGETS.get((workload, contender))
        lines.append(
            f"| {contender} | {score.median_s:.4f} | {faster} | {f'{target:g}x' if target else ''} | "
            f"{load.cohort / score.median_s:,.0f} | {limit_s / score.median_s:.1%} | {score.peak_mb:.0f} MB |"
        )
    if workload in NOTE:
        lines += ["", f"{NOTE[workload]}."]
    if "ours" in scores:
        lines += ["", f"Ours grows by {scores['ours'].growth_mb:.1f} MB from the second round to the last."]
    return [*lines, ""]


def verdicts(
    scores: dict[str, dict[str, Score]], agree: dict[str, dict[str, float]], first: list[tuple[float, float]]
) -> dict:
    """Claim to whether it holds."""
    found = {}
    for (workload, peer), target in TARGETS.items():
        of = scores.get(workload, {})
        if "ours" in of and peer in of:
            ratio = of[peer].median_s / of["ours"].median_s
            found[f"{workload}: {ratio:.1f}x faster than {peer}, target {target:g}x"] = ratio >= target
    for workload, bound in PEAK_MB.items():
        if "ours" in scores.get(workload, {}):
            peak = scores[workload]["ours"].peak_mb
            found[f"{workload}: peak memory {peak:.0f} MB, target below {bound} MB"] = peak < bound
    for workload, rules in RULES.items():
        of = scores.get(workload, {})
        for rule in rules:
            if f"ours:{rule}" in of and f"pfl:{rule}" in of:
                ratio = of[f"pfl:{rule}"].median_s / of[f"ours:{rule}"].median_s
                found[f"{workload} with {rule}: {ratio:.1f}x faster than pfl's, target {RULE_TARGET:g}x"] = (
                    ratio >= RULE_TARGET
                )
    for workload, pairs in agree.items():
        peers = pairs["each other"]
        bound = max(AGREE, APART * peers)
        for peer, distance in pairs.items():
            if peer != "each other":
                text = f"{workload}: final weights as {peer}'s, apart by {distance:.1e}; peers among themselves {peers:.1e}"
                found[f"{text}; bound {bound:.1e}"] = distance <= bound
    if first:
        wall, cpu = (statistics.median(column) for column in zip(*first, strict=True))
        text = f"W2: first row of fedlearn simulate after {cpu:.1f} CPU s ({wall:.1f} s on this busy machine)"
        found[f"{text}, target {FIRST_RESULT_S:g} s"] = cpu <= FIRST_RESULT_S
    return found


def page(text: str, verdict: dict[str, bool], limit: float, turns: int) -> str:
    return "\n".join(
        [
            "# The simulator: CPU seconds per round on one core",
            "",
            (
                f"`python -m benchmarks.simulation`: one pinned core of a {os.cpu_count()}-core {platform.machine()} VM shared with other"
                f" work, {limit:.0f} GFLOP/s in sgemm measured in the same run. Medians of the rounds after {WARM_UP} to warm up, in {turns}"
                " turns. The machine is noisy: ratios count."
            ),
            "",
            text,
            "ours is `fedlearn.simulate` with its whole round (cohort, integer sum, journal, training loss); sequential the same on the oracle.",
            "pfl trains and nothing else; pfl+loss also evaluates each user, which is how it gets a training loss. loop is one model, fused",
            "updates, no copies. opacus is a privacy engine a client, as its documentation has it. The peers' clients and batches are drawn",
            "before the clock starts, which favours them. flower200 and flower1000 run on Ray with so many nodes; CPU time is that of the whole",
            "family of processes, memory what it holds at the end.",
            "",
            *(f"- {claim}: **{'holds' if held else 'does not hold'}**" for claim, held in verdict.items()),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=lambda t: t.split(","), default=["W1", "W2", "W3", "W3b"])
    parser.add_argument("--peers", type=lambda t: t.split(","), default=["sequential", "loop", "pfl", "opacus"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--pfl-path", default="", help="the folder that pfl was installed into")
    parser.add_argument("--flower-python", default=sys.executable, help="a Python with flwr[simulation] and fedlearn")
    parser.add_argument("--first-result", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/simulation.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        runner = Runner(arguments, Path(name))
        wanted = {c for w in PEERS.values() for c in w if _family(c) in arguments.peers}
        absent = {name: why for name in sorted({_family(c) for c in wanted}) if (why := runner.missing(name))}
        for why in absent.values():
            print(why, file=sys.stderr)
        limit = max(runner.run("gflops", "W1", 1)[0]["gflops"] for _ in range(3))
        scores: dict[str, dict[str, Score]] = {}
        agree: dict[str, dict[str, float]] = {}
        for workload in arguments.workloads:
            peers = [c for c in PEERS[workload] if c in wanted and _family(c) not in absent]
            own = ["ours", *(f"ours:{rule}" for rule in RULES.get(workload, ()))]
            scores[workload] = measure(runner, workload, [*own, *peers], arguments.turns)
            if compared := [c for c in peers if c in {"loop", "pfl"}]:
                agree[workload] = disagreement(runner, workload, compared, 2 if workload == "W1" else 5)
        first = first_result(arguments.core) if arguments.first_result else []
    text = "\n".join(line for w, s in scores.items() for line in table(w, s, limit))
    verdict = verdicts(scores, agree, first)
    print(page(text, verdict, limit, arguments.turns))
    if arguments.write:
        RESULTS.write_text(page(text, verdict, limit, arguments.turns), encoding="utf-8")
    return 0 if all(verdict.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
