"""kill -9 of an agent at any moment: what left is in the ledger, and what left once leaves as the same bytes again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
from flwr.app import Message

from client import records
from client.guard import guard_of
from fedlearn.learning.heads import take_heads
from fedlearn.privacy.budget import Budget, spent_epsilon
from fedlearn.privacy.chain import Kind, Record
from fedlearn.privacy.events import Cost
from fedlearn.privacy.ledger_file import LEDGER_FILE, charges_of, read_records, verify_ledger
from fedlearn.privacy.study import plan_of
from fedlearn.release.records import Status
from tests.support.private_site import CLIENT, SITE, PrivateSite, Worker, ask, private_site, study_of

POLICY = "mixed_units = true\n[budgets.record]\nepsilon = 1000.0\ndelta = 1e-5\n[budgets.client]\nepsilon = 1000.0\ndelta = 1e-5\n"
MANY = study_of('unit = "record"\nnoise_multiplier = 20.0\ndelta = 1e-5\nsteps = 1\n', rounds=100_000)
RECORDS, CLIENTS = "hospital/heart/record", "hospital/heart/client"


async def send(one: PrivateSite, out: int, message: Message, label: str) -> None:
    """Answer one message; once it has left, a line in the file `wire` says so."""
    reply = await one.site.handle(message)
    take_heads(reply.content)
    os.write(out, f"{label} {hashlib.sha256(records.pack(reply.content)).hexdigest()}\n".encode())


async def live(folder: Path, life: int) -> None:
    """A site that is asked as fast as it answers, until it is killed. The server first asks again for what it may have missed."""
    wire = folder / "wire"
    done = [int(line.split()[1]) for line in lines(wire) if line.startswith("record")]
    out = os.open(wire, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    number = max(done, default=0)
    with private_site(folder / "state", Worker(), POLICY) as one:
        open_rounds = {r.key.round for r in one.gate.releases("run-1") if r.status is Status.COMMITTED}
        if number not in open_rounds:  # else the server may have lost it: it asks again
            number += 1
        await send(one, out, ask(CLIENT, run=f"client-{life}"), f"client {life}")
        while True:
            await send(one, out, ask(MANY, number), f"record {number}")
            number += 1


def lines(wire: Path) -> list[str]:
    return wire.read_text().splitlines() if wire.exists() else []


def check(folder: Path, found: list[Record]) -> int:
    """What left against what is charged; how many updates left."""
    told = [line.split() for line in lines(folder / "wire")]
    bytes_of: dict[tuple[str, str], set[str]] = {}
    for kind, number, digest in told:
        bytes_of.setdefault((kind, number), set()).add(digest)
    assert all(len(digests) == 1 for digests in bytes_of.values())
    charged = {r.body["key"]["round"] for r in found if r.kind is Kind.CHARGE and r.body["account"] == RECORDS}
    admitted = {r.body["key"]["run"] for r in found if r.kind is Kind.CHARGE and r.body["account"] == CLIENTS}
    left = Counter(kind for kind, _ in bytes_of)
    assert {int(number) for kind, number in bytes_of if kind == "record"} <= charged
    assert {f"client-{number}" for kind, number in bytes_of if kind == "client"} <= admitted
    budget = Budget(1000.0, 1e-5)
    for account, plan_cost in (
        (RECORDS, plan_of(MANY).cost(max(1, left["record"]))),
        (CLIENTS, plan_of(CLIENT).cost(max(1, left["client"]) * CLIENT.rounds)),
    ):
        kind = account.rpartition("/")[2]
        written = spent_epsilon([Cost.from_text(c.cost) for c in charges_of(found, account)], budget)
        assert not left[kind] or written >= spent_epsilon([plan_cost], budget) - 1e-9
    return sum(left.values())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # newer Pythons warn of forks; the child makes its own threads
@pytest.mark.parametrize(
    ("kills", "seed"), [(12, 1), pytest.param(300, 2, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_kill_9_never_leaves_the_ledger_below_what_left(tmp_path, kills, seed):
    for study, account in ((MANY, RECORDS), (CLIENT, CLIENTS)):
        guard_of(study.to_json(), account)  # so that a life is not spent on it
    chance, total = random.Random(seed), 0
    for life in range(kills):
        folder = tmp_path / str(life // 20)
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(live(folder, life))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        before, give_up = len(lines(folder / "wire")), time.monotonic() + 20
        while chance.random() < 0.999 and len(lines(folder / "wire")) == before and time.monotonic() < give_up:
            os.sched_yield()  # mostly until something left in this life, now and then while it still starts
        time.sleep(chance.uniform(0.0, 0.05))  # where it then is, is chance
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        ledger = folder / "state" / "ledgers" / "hospital-heart"
        found = read_records(ledger) if (ledger / LEDGER_FILE).exists() else []
        left = check(folder, found)
        if life % 20 == 19 or life == kills - 1:
            total += left
            assert verify_ledger(ledger).site == SITE
    assert total > kills
