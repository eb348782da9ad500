"""The bytes that a simulation counts are those that the link hands to gRPC in a real federation, to the byte."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import client.app
from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.learning.backend import Fitted, Work
from fedlearn.learning.local import initial_weights
from fedlearn.learning.messages import RequestEncoder
from fedlearn.link import framing
from fedlearn.link.frames import Ack, Chunk, End, Start
from fedlearn.link.limits import LinkLimits
from fedlearn.link.session import Session
from fedlearn.link.states import Side
from fedlearn.simulation import traffic
from fedlearn.simulation.traffic import Traffic
from server.rounds import GridBackend
from tests.support.link_net import link_net
from tests.support.private_plans import RECORD
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

RUN = 0xF123456789ABCDEF >> 1


class Tap:
    """Counts the frames of messages on every session of this process, by direction."""

    def __init__(self, monkeypatch) -> None:
        self.bytes, self.acks, self._changed = Counter(), 0, threading.Condition()
        send = Session.send

        def counted(session, now):
            frame = send(session, now)
            if frame is not None:
                self._count(session.side, frame)
            return frame

        monkeypatch.setattr(Session, "send", counted)

    def _count(self, side, frame):
        kind = framing.unpack(frame, LinkLimits())
        if isinstance(kind, Start | Chunk | End | Ack):
            with self._changed:
                self.bytes["up" if side is Side.INITIATOR else "down"] += len(frame)
                self.acks += isinstance(kind, Ack)
                self._changed.notify_all()

    def until_acknowledged(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: self.acks >= count, 20)


def work_of(study, strategy, round_, base=None) -> Work:
    model = initial_weights(TinyTask(**study.task.options), study)
    state = strategy.server_init(model)
    return Work(round_, 1, CLIENTS, model, state.shared, digest(model), base or {}, 20.0)


@pytest.mark.parametrize(
    "overrides",
    [(), ("strategy.name=scaffold",), ("task.options.hidden=40000",), (*RECORD, "privacy.seeded=true")],
    ids=["fedavg", "scaffold", "several chunks", "private records"],
)
def test_a_round_weighs_what_the_link_sends(overrides, tmp_path, monkeypatch):
    study = tiny_study(*overrides, "runtime.deadline_s=20.0")
    strategy = load_app().strategy(study.strategy.name, study.strategy.options)
    tap = Tap(monkeypatch)
    with link_net(tmp_path, CLIENTS, client.app.app) as net:
        grid = net.grid(RUN)
        backend = GridBackend(grid, RequestEncoder(f"{RUN:016x}", study.to_json(), "a" * 64), net.name_of)
        assert list(backend.clients(4, 20.0)) == list(CLIENTS)
        for number, base in ((1, {}), (2, {c: (1, 1) for c in CLIENTS if strategy.stateful})):
            tap.until_acknowledged(8)
            tap.bytes.clear()
            tap.acks = 0
            work = work_of(study, strategy, number, base)
            replies = list(backend.fit(work))
            assert all(isinstance(reply, Fitted) for reply in replies)
            tap.until_acknowledged(8)
            examples = {reply.client: reply.update.examples for reply in replies}
            counted = Traffic.of(study, strategy, work)
            up = counted.up(work, CLIENTS, np.array([examples[c] for c in CLIENTS]))
            assert tap.bytes == {"down": counted.down(work, CLIENTS).sum(), "up": up.sum()}


def test_numbers_stand_for_all_that_take_as_many_bytes():
    for value in [1, 2, 63, 64, 127, 128, 8191, 8192, 2**56 - 1, 2**56, 2**62]:
        assert len(framing._varint(traffic._number_like(value))) == len(framing._varint(value))
        assert len(framing._varint(2 * traffic._number_like(value, signed=True))) == len(framing._varint(2 * value))


def test_a_large_model_is_weighed_without_being_made():
    study = tiny_study()
    strategy = load_app().strategy("fedavg", {})
    work = work_of(study, strategy, 1)
    large = {"w": np.broadcast_to(np.float32(0), (10**5, 10**5))}
    weight = Traffic.of(study, strategy, replace(work, model=large))
    chunks = 4 * 10**10 / weight.chunk_bytes
    for size in (*weight.down(work, ("a", "b")), *weight.up(work, ("a", "b"), np.array([10, 1000]))):
        assert 4 * 10**10 + 30 * chunks < size < 4 * 10**10 + 40 * chunks + 10_000
