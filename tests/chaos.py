"""Kill -9 at random, for as long as you like: every run must end with the bytes of an undisturbed one.

    python -m tests.chaos [--seed 1] [--runs 10]

Each run has a seed of its own, which decides what is killed, and when; it is printed, so that a failure can be looked at
again. A coordinator, a site's agent or a site's worker dies every second or so, wherever it then is.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import fedlearn
from fedlearn import events
from fedlearn.arrays import digest, from_bytes
from tests.support.federation import ENV, HOSPITALS, STUDY, Federation, children
from tests.support.processes import family

STUDIES = (
    ("rounds=8", "cohort.minimum=4", "evaluate.every=3"),
    ("rounds=8", "cohort.minimum=4", "evaluate.every=3", "strategy.name=scaffold"),
    ("rounds=8", "cohort.minimum=4", "evaluate.every=3", "strategy.name=ditto"),
    ("rounds=8", "cohort.minimum=4", "evaluate.every=0", "strategy.name=fedadam"),
)
# Every site's update is in every round, so that there is one right answer; a void attempt is tried again.
PATIENT = ("runtime.max_attempts=100", "runtime.deadline_s=60")
LIMIT_S = 120.0


def main() -> int:
    """Run the loop; 1 when a run ended otherwise than it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    asked = parser.parse_args()
    expected = {study: digest(fedlearn.simulate(STUDY, overrides=list(study)).weights) for study in STUDIES}
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="fl-chaos-") as folder, family(Path(folder), ENV) as processes:
        federation = Federation(processes, Path(folder))
        federation.coordinator()
        policy = Path(folder) / "policy.toml"
        policy.write_text("max_voids_per_run = 1000\n")
        sites = ("--policy", str(policy))
        for name in HOSPITALS:
            federation.site(name, *sites)
        for seed in range(asked.seed, asked.seed + asked.runs):
            watchdog = threading.Timer(LIMIT_S, give_up, (federation, seed))
            watchdog.start()
            wrong += not one_run(federation, random.Random(seed), seed, expected, sites)
            watchdog.cancel()
    say(f"{asked.runs - wrong} of {asked.runs} runs ended with the undisturbed bytes")
    return 1 if wrong else 0


def give_up(federation: Federation, seed: int) -> None:
    """A run that does not end is a failure too: show what every process said, and end."""
    for one in federation.logs:
        say(f"== {' '.join(one.command[3:6])}, process {one.process.pid}, status {one.process.poll()}\n{one.output}")
    say(f"seed {seed}: not over after {LIMIT_S:.0f} s")
    federation.processes.stop()
    os._exit(1)


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)  # noqa: T201  # a command, not a test


def one_run(
    federation: Federation,
    chance: random.Random,
    seed: int,
    expected: dict[tuple[str, ...], str],
    sites: tuple[str, ...],
) -> bool:
    """One disturbed run; True when it ended as it must."""
    study = chance.choice(STUDIES)
    run = federation.submit(*study, *PATIENT)
    started, done, killed = time.monotonic(), threading.Event(), []
    chaos = threading.Thread(target=lambda: killed.extend(disturb(federation, chance, done, sites)))
    chaos.start()
    try:
        found = federation.follow(run)
    finally:
        done.set()
        chaos.join()
    got = digest(from_bytes(federation.model(run))) if isinstance(found[-1], events.RunFinished) else repr(found[-1])
    right = got == expected[study]
    took = time.monotonic() - started
    end = "same bytes" if right else f"DIFFERENT: {got}, expected {expected[study]}"
    say(f"seed {seed}: {' '.join(study[3:]) or 'fedavg'}: {took:.1f} s, killed {', '.join(killed) or 'nothing'}: {end}")
    return right


def disturb(federation: Federation, chance: random.Random, done: threading.Event, sites: tuple[str, ...]) -> list[str]:
    """Kill something now and then until told to stop; what was killed."""
    killed: list[str] = []
    while not done.wait(chance.uniform(0.0, 1.5)) and len(killed) < 6:
        victim = chance.choice(("coordinator", "agent", "agent", "worker"))
        name = chance.choice(HOSPITALS)
        killed.append(victim if victim == "coordinator" else f"{name}'s {victim}")
        if victim == "coordinator":
            federation.kill("coordinator")
            federation.coordinator()
        elif victim == "agent":
            federation.kill(name)
            federation.site(name, *sites, wait=False)
        else:
            for pid in children(federation.running[name].process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    return killed


if __name__ == "__main__":
    sys.exit(main())
