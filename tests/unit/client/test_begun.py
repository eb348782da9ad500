"""Trainings that wait to be asked for: one each, bounded, and with nothing left behind by those that are given up."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest
from flwr.app import ConfigRecord, RecordDict

from client import records
from client.begun import MOST_WAITING, Begun
from client.outbox import Job, Outbox
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError
from fedlearn.release.charge import Charge, CostCharger
from fedlearn.release.journal import DictJournal
from fedlearn.release.keys import TRAIN, AttemptId, ReleaseKey
from fedlearn.release.site import SiteGate

LONG_S = 60.0
DIGEST, OTHER = "a" * 64, "b" * 64


class Site:
    """A gate with a budget of ten, an outbox, and work that a test lets go on."""

    def __init__(self):
        self.gate = SiteGate(DictJournal(), CostCharger({"data": Decimal(10)}))
        self.outbox = Outbox(self.gate)
        self.begun = Begun(self.outbox)
        self.trained = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.fails = False

    def job(self, key, cost="1"):
        async def compute(_reserved):
            self.trained.append(key)
            await self.goes_on.wait()
            if self.fails:
                raise RemoteProtocolError("the app raised")
            return RecordDict({"of": ConfigRecord({"at": str(key.at)})}), None

        def reserve():
            return self.gate.reserve(key, charge=Charge("data", cost))

        return Job(key, reserve, compute, lambda content: content)

    async def begin(self, key, *, cost="1", patience_s=LONG_S):
        return await self.begun.begin(self.job(key, cost), masked, patience_s)

    def left(self):
        return [str(release.key.at) for release in self.gate.releases()]


def masked(content, sealed):
    return RecordDict({**content, "sealed": ConfigRecord({"by": sealed})})


def key_of(round_=1, attempt=1, run="run", digest=DIGEST):
    return ReleaseKey(run, round_, attempt, TRAIN, digest)


async def over(site, training):
    """Wait for its end, and for its reservation to be given back."""
    await asyncio.wait({training._task})
    while running := set(site.outbox._running):
        await asyncio.wait(running)


async def test_an_update_waits_for_what_the_others_sealed():
    site = Site()
    training = await site.begin(key_of())
    assert site.left() == []
    payload = await training.finished(b"sealed")
    assert records.unpack(payload)["sealed"]["by"] == b"sealed"
    assert site.left() == ["round 1 attempt 1"]
    assert site.begun.get(key_of()) is None, "nothing of it is kept: the outbox has the bytes"
    assert await (await site.begin(key_of())).finished(b"sealed") == payload
    assert site.trained == [key_of()]


async def test_who_asks_before_it_has_trained_waits():
    site = Site()
    site.goes_on.clear()
    training = await site.begin(key_of())
    asking = [asyncio.create_task(training.finished(b"sealed")) for _ in range(2)]
    again = await site.begin(key_of())
    assert again is training
    site.goes_on.set()
    first, second = await asyncio.gather(*asking)
    assert first == second
    assert site.trained == [key_of()]


async def test_one_that_nobody_asks_for_is_given_up_and_costs_nothing():
    site = Site()
    training = await site.begin(key_of(), cost="10", patience_s=0.01)
    assert len(site.gate.spent("data")) == 1
    await over(site, training)
    assert site.begun.get(key_of()) is None
    assert site.gate.spent("data") == ()
    assert site.left() == []
    with pytest.raises(RemoteProtocolError, match="given up"):
        await training.finished(b"sealed")
    assert await (await site.begin(key_of(), cost="10")).finished(b"sealed")
    assert site.trained == [key_of()] * 2


async def test_who_stops_asking_takes_the_word_back():
    """A server that gave the round up is sent nothing, so nothing is charged; one that comes back finds what was trained."""
    site = Site()
    site.goes_on.clear()
    training = await site.begin(key_of())
    asking = asyncio.create_task(training.finished(b"sealed"))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    site.goes_on.set()
    await asyncio.sleep(0)
    assert site.begun.get(key_of()) is training
    assert site.left() == []
    assert await training.finished(b"sealed")
    assert site.trained == [key_of()]


async def test_a_refusal_is_told_to_who_begins_and_a_failure_to_who_asks():
    site = Site()
    with pytest.raises(PolicyRefusedError, match="budget"):
        await site.begin(key_of(), cost="11")
    assert site.begun.get(key_of()) is None
    assert site.trained == []
    site.fails = True
    training = await site.begin(key_of())
    with pytest.raises(RemoteProtocolError, match="the app raised"):
        await training.finished(b"sealed")
    assert site.begun.get(key_of()) is None
    await over(site, training)
    assert site.gate.spent("data") == ()


async def test_a_failure_that_nobody_asked_about_is_kept_and_tried_again_by_who_begins_again():
    site = Site()
    site.fails = True
    training = await site.begin(key_of())
    await over(site, training)
    assert site.begun.get(key_of()) is training
    site.fails = False
    assert await (await site.begin(key_of())).finished(b"sealed")
    assert site.trained == [key_of()] * 2


async def test_a_later_attempt_ends_an_earlier_one_and_nothing_else_does():
    site = Site()
    first = await site.begin(key_of(1, 1))
    elsewhere = await site.begin(key_of(run="other"))
    with pytest.raises(PolicyRefusedError, match="other-model"):
        await site.begin(key_of(1, 1, digest=OTHER))
    site.begun.overtaken("run", AttemptId(1, 1))
    assert site.begun.get(key_of(1, 1)) is first
    second = await site.begin(key_of(1, 2))
    with pytest.raises(RemoteProtocolError, match="given up"):
        await first.finished(b"sealed")
    with pytest.raises(PolicyRefusedError, match="stale"):
        await site.begin(key_of(1, 1))
    site.begun.overtaken("run", AttemptId(2, 1))
    with pytest.raises(RemoteProtocolError, match="given up"):
        await second.finished(b"sealed")
    assert await elsewhere.finished(b"sealed")


async def test_a_closed_run_and_a_site_that_stops_leave_nothing_waiting():
    site = Site()
    one, other, third = [await site.begin(key_of(run=run)) for run in ("one", "other", "third")]
    site.begun.closed("one")
    await over(site, one)
    assert [site.begun.get(training.key) for training in (one, other)] == [None, other]
    site.begun.close()
    await over(site, third)
    assert site.gate.spent("data") == ()


async def test_so_many_wait_and_no_more():
    site = Site()
    trainings = [await site.begin(key_of(run=f"run-{number}"), cost="0.1") for number in range(MOST_WAITING + 1)]
    with pytest.raises(RemoteProtocolError, match="given up"):
        await trainings[0].finished(b"sealed")
    assert await trainings[1].finished(b"sealed")
    assert len(site.gate.spent("data")) == MOST_WAITING
