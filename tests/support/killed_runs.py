"""Runs that are killed at random moments until they are through: `python -m tests.support.killed_runs FOLDER SEED STRATEGY...`.

One process imports torch and forks a child for each piece of a run, so that a kill costs no import. Prints one JSON object a
strategy: the digests of the run that was left alone and of the one that was killed, and how often it was.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
from pathlib import Path

import fedlearn
from fedlearn.arrays import digest
from fedlearn.errors import StateError
from fedlearn.report.folder import RunFolder
from fedlearn.simulation import journal
from fedlearn.study import Study
from tests.support.tiny_task import tiny_study

ROUNDS = 8
LONGEST_S = 0.3
MOST_KILLS = 5


def study_of(strategy: str) -> Study:
    """Three of four clients a round, one after another; of `batched-STRATEGY` twelve of eighteen, in blocks."""
    way, _, name = strategy.rpartition("-")
    options = [f"strategy.name={name}", f"rounds={ROUNDS}", "train.epochs=3", "evaluate.every=2"]
    if way:
        crowd = ["data.partition=iid", "data.clients=18", "data.folds=1", "cohort.size=12", "cohort.wait_for=12"]
        return tiny_study(*options, *crowd, "task.options={hidden=6}")
    return tiny_study(*options, "cohort.size=3", "cohort.wait_for=3", "task.options={hidden=6, dropout=0.3}")


def result_of(folder: Path) -> dict[str, object]:
    rows = json.loads((folder / "history.json").read_text())
    plain = [{key: value for key, value in row.items() if key not in {"seconds", "attempt"}} for row in rows]
    return {"model": digest(RunFolder(folder).weights()), "history": plain}


def simulate(study: Study, folder: Path) -> None:
    if (folder / "run.json").exists():
        fedlearn.simulate(resume=folder)
    else:
        fedlearn.simulate(study, out=folder)


def fork(study: Study, folder: Path, limit_bytes: int | None = None) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        simulate(study, folder)
    except StateError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(12)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def killed(study: Study, folder: Path, chance: random.Random) -> int:
    """Run and kill until it is through; how often it was killed."""
    kills = 0
    while True:
        pid = fork(study, folder)
        handle = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        # After so many kills it is let go on to its end.
        ended = poll.poll(chance.uniform(0.0, LONGEST_S) * 1000 if kills < MOST_KILLS else None)
        if not ended:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            kills += 1
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return kills


def on_a_full_disk(study: Study, folder: Path) -> list[int]:
    """Exit codes of a run under ever higher limits on a file's size, until it is through."""
    codes, limit = [], 30_000
    while not codes or codes[-1] != 0:
        _, status = os.waitpid(fork(study, folder, limit), 0)
        codes.append(os.waitstatus_to_exitcode(status))
        limit *= 4
    return codes


def main(folder: Path, seed: int, strategies: list[str]) -> None:
    journal.EVERY_S = 0.0  # each write by itself: the most moments to be killed at
    fedlearn.simulate(study_of("fedavg"), rounds=1).plot()  # what a first round imports, the children have then
    for strategy in strategies:
        study = study_of(strategy)
        pid = fork(study, folder / f"{strategy}-alone")
        assert os.waitpid(pid, 0)[1] == 0
        alone = result_of(folder / f"{strategy}-alone")
        kills = killed(study, folder / f"{strategy}-killed", random.Random(f"{seed} {strategy}"))
        found = {
            "strategy": strategy,
            "kills": kills,
            "alone": alone,
            "killed": result_of(folder / f"{strategy}-killed"),
        }
        found["codes"] = on_a_full_disk(study, folder / f"{strategy}-full")
        found["full"] = result_of(folder / f"{strategy}-full")
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
