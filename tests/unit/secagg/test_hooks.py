"""Secure aggregation behind the release path's round machine, with crashes."""

from __future__ import annotations

import pytest

from fedlearn.errors import LocalProtocolError, StateError
from fedlearn.release import (
    Accepted,
    AttemptId,
    Begin,
    MemoryDisk,
    MemoryJournal,
    Rejected,
    Resume,
    RoundMachine,
    RoundState,
)
from fedlearn.secagg import graph
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.hooks import MaskedAttempt, record_of, restore
from fedlearn.secagg.messages import Delivery, Reveals, Roster, from_bytes, to_bytes
from fedlearn.secagg.server import ServerRound
from tests.support.secagg_world import SUBJECT, World, malicious, name_of

AT = AttemptId(1, 1)


class Coordinator:
    """A round machine over a disk, its server, and what it asked."""

    def __init__(self, world, disk, server):
        self.world = world
        self.attempt = MaskedAttempt(server)
        self.machine = RoundMachine(
            MemoryJournal(disk), "run", accumulator=lambda: self.attempt, masking=lambda: self.attempt
        )

    @classmethod
    def begun(cls, world, disk):
        made = cls(world, disk, world.server)
        made.machine.begin(AT, world.clients, "model")
        return made

    @classmethod
    def after_a_crash(cls, world, disk, record):
        server = ServerRound(world.terms, world.trust, SUBJECT)
        restore(server, record)
        return cls(world, disk, server)


def payloads(world):
    """What each site has in its outbox: the bytes that it would send again."""
    return {name: to_bytes(world.answer(name, message)) for name, message in world.out.items()}


def finish(coordinator, names):
    """Ask, answer, commit; the machine's sum must be the exact one."""
    machine, world = coordinator.machine, coordinator.world
    key, requests = machine.unmask_requests()
    assert set(requests) == set(names)
    for name, body in requests.items():
        reply = world.clients[name].receive(from_bytes(body))
        if machine.state is RoundState.UNMASKING:
            assert isinstance(machine.unmasked(name, key, to_bytes(reply)), Accepted)
    assert machine.state is RoundState.SUMMED
    total = machine.total.total
    assert [*total.integers.tolist(), total.weight] == world.expected(names)
    machine.commit(b"record")


@pytest.mark.parametrize("missing", [[], [name_of(2)]])
def test_a_round(missing):
    world = World(5).delivered()
    coordinator, sent = Coordinator.begun(world, MemoryDisk()), payloads(world)
    names = [name for name in sent if name not in missing]
    for name in names:
        assert isinstance(coordinator.machine.receive(name, coordinator.machine.key, sent[name]), Accepted)
    assert coordinator.machine.close() is RoundState.UNMASKING
    finish(coordinator, names)


def test_too_few_payloads_void_the_attempt():
    world = World(5).delivered()
    coordinator, sent = Coordinator.begun(world, MemoryDisk()), payloads(world)
    for name in list(sent)[:3]:
        coordinator.machine.receive(name, coordinator.machine.key, sent[name])
    assert coordinator.machine.close() is RoundState.VOID
    assert "at least 4" in coordinator.machine.reason


@pytest.mark.parametrize("received", [0, 2, 5])
def test_a_crash_while_payloads_arrive(received):
    world, disk = World(5).delivered(), MemoryDisk()
    record, sent = record_of(world.server), payloads(world)
    first = Coordinator.begun(world, disk)
    for name in list(sent)[:received]:
        first.machine.receive(name, first.machine.key, sent[name])
    second = Coordinator.after_a_crash(world, disk, record)
    assert isinstance(second.machine.next_step, Resume)
    for name, payload in sent.items():
        assert isinstance(second.machine.receive(name, second.machine.key, payload), Accepted)
    second.machine.close()
    finish(second, list(sent))


@pytest.mark.parametrize("answered", [0, 2])
def test_a_crash_after_the_survivors_stand(answered):
    world, disk = World(5).delivered(), MemoryDisk()
    record, sent = record_of(world.server), payloads(world)
    first, names = Coordinator.begun(world, disk), [name for name in sent if name != name_of(4)]
    for name in names:
        first.machine.receive(name, first.machine.key, sent[name])
    first.machine.close()
    for name, body in list(first.machine.unmask_requests()[1].items())[:answered]:
        world.clients[name].receive(from_bytes(body))
    second = Coordinator.after_a_crash(world, disk, record)
    assert second.machine.state is RoundState.REFILL
    late = second.machine.receive(name_of(4), second.machine.key, sent[name_of(4)])
    assert isinstance(late, Rejected), "the survivors stand: a client answers no other request"
    for name in names:
        second.machine.receive(name, second.machine.key, sent[name])
    finish(second, names)


def test_a_bad_payload_is_rejected_and_the_round_goes_on():
    world = World(5).delivered()
    coordinator, sent = Coordinator.begun(world, MemoryDisk()), payloads(world)
    machine = coordinator.machine
    for bad in (b"", sent[name_of(0)][:-4], sent[name_of(1)], to_bytes(Roster(world.server._members))):
        world_name = name_of(0)
        assert isinstance(machine.receive(world_name, machine.key, bad), Rejected)
    names = [name for name in sent if name != name_of(0)]
    for name in names:
        machine.receive(name, machine.key, sent[name])
    machine.close()
    finish(coordinator, names)


def test_a_damaged_or_foreign_record_is_refused():
    world = World(4).delivered()
    record = record_of(world.server)
    for bad in (b"\xff\xff", record[:-20], b"", record_of(World(4, at=AttemptId(1, 2)).delivered().server)):
        with pytest.raises(StateError, match=r"damaged|incomplete"):
            restore(ServerRound(world.terms, world.trust, SUBJECT), bad)


def test_nothing_secret_is_recorded():
    world = World(4).delivered()
    record = record_of(world.server)
    for client in world.clients.values():
        for secret in (client._mask_key.secret, client._seed, *client._channels.values()):
            assert secret not in record


def test_the_hooks_start_when_masked_vectors_are_collected():
    with pytest.raises(LocalProtocolError, match="expected masked vectors"):
        MaskedAttempt(World(4).rostered().server)
    attempt = MaskedAttempt(World(4).delivered().server)
    with pytest.raises(LocalProtocolError, match="survivors are not"):
        attempt.requests(None, (), (name_of(0),))


def test_the_next_round_begins_after_a_commit():
    world = World(3).delivered()
    coordinator, sent = Coordinator.begun(world, MemoryDisk()), payloads(world)
    for name, payload in sent.items():
        coordinator.machine.receive(name, coordinator.machine.key, payload)
    coordinator.machine.close()
    finish(coordinator, list(sent))
    assert coordinator.machine.next_step == Begin(AttemptId(2, 1))


class Agreeing(Coordinator):
    """A coordinator whose clients agree on the survivors before they open."""

    def collected(self, sent):
        for name, payload in sent.items():
            assert isinstance(self.machine.receive(name, self.machine.key, payload), Accepted)
        if self.machine.state is RoundState.OPEN:
            self.machine.close()
        assert self.attempt.agrees
        return self

    def told(self):
        """What each survivor is asked to sign."""
        return self.machine.unmask_requests()[1]

    def agree(self, names):
        for name in names:
            reply = self.world.clients[name].receive(from_bytes(self.told()[name]))
            self.attempt.agree(name, to_bytes(reply))

    def open(self, told, names):
        key = self.machine.unmask_requests()[0]
        for name in names:
            reply = self.world.clients[name].receive(from_bytes(told[name]))
            if self.machine.state is RoundState.UNMASKING:
                assert isinstance(self.machine.unmasked(name, key, to_bytes(reply)), Accepted)
        assert self.machine.state is RoundState.SUMMED
        return [*self.machine.total.total.integers.tolist(), self.machine.total.total.weight]


def agreeing(missing=()):
    world, disk = malicious(5).delivered(), MemoryDisk()
    record, sent = record_of(world.server), payloads(world)
    sent = {name: payload for name, payload in sent.items() if name not in missing}
    return world, disk, record, sent


@pytest.mark.parametrize("silent", [[], [name_of(4)]])
def test_survivors_that_agree_open_the_sum(silent):
    world, disk, _, sent = agreeing()
    coordinator = Agreeing.begun(world, disk).collected(sent)
    signers = [name for name in sent if name not in silent]
    coordinator.agree(signers)
    told, _ = coordinator.attempt.agreed()
    assert set(told) == set(sent), "whose agreement was lost on its way may still open"
    assert coordinator.open(told, signers) == world.expected(sent)


def test_nothing_is_opened_before_a_quorum_agrees():
    world, disk, _, sent = agreeing()
    coordinator = Agreeing.begun(world, disk).collected(sent)
    coordinator.agree(list(sent)[:3])
    with pytest.raises(SecureAggregationError) as caught:
        coordinator.attempt.agreed()
    assert caught.value.breach is Breach.BELOW_THRESHOLD
    assert not coordinator.attempt.ready()


def test_a_crash_while_survivors_agree():
    world, disk, record, sent = agreeing(missing=[name_of(2)])
    first = Agreeing.begun(world, disk).collected(sent)
    first.agree(list(sent)[:2])
    second = Agreeing.after_a_crash(world, disk, record).collected(sent)
    assert second.told() == first.told(), "a client signs one set of survivors"
    second.agree(sent)
    told, _ = second.attempt.agreed()
    assert second.open(told, sent) == world.expected(sent)


def test_a_crash_after_the_agreements_stand():
    """Who has opened for one set of signatures answers no other one, so the coordinator comes back with the same."""
    world, disk, record, sent = agreeing()
    first = Agreeing.begun(world, disk).collected(sent)
    first.agree(list(sent)[:4])
    told, agreements = first.attempt.agreed()
    world.clients[name_of(0)].receive(from_bytes(told[name_of(0)]))
    second = Agreeing.after_a_crash(world, disk, record).collected(sent)
    assert second.attempt.agreed_before(agreements) == told
    assert second.open(told, list(sent)[:4]) == world.expected(sent)


def test_damaged_or_foreign_agreements_are_refused():
    world, disk, record, sent = agreeing()
    first = Agreeing.begun(world, disk).collected(sent)
    first.agree(sent)
    _, agreements = first.attempt.agreed()
    for bad in (b"\xff\xff", agreements[:-20], b"", record):
        second = Agreeing.after_a_crash(world, MemoryDisk(), record)
        second.machine.begin(AT, world.clients, "model")
        with pytest.raises(StateError, match=r"damaged|incomplete"):
            second.collected(sent).attempt.agreed_before(bad)


def test_a_sparse_graphs_setup_is_recorded_with_its_nonces(monkeypatch):
    monkeypatch.setattr(graph, "COMPLETE_LIMIT", 10)
    world = World(60, plan={"adversarial": 0.02, "dropout": 0.05}).delivered()
    server = ServerRound(world.terms, world.trust, SUBJECT)
    roster, nonces, told = restore(server, record_of(world.server))
    assert [type(next(iter(said.values()))) for said in (roster, nonces, told)] == [Roster, Reveals, Delivery]
    assert told == world.out
    assert server.agrees
