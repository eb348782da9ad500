"""A client's part over the attempts of a run, as bytes: what is answered again, what is over, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from fedlearn.errors import LocalProtocolError
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientState, Identity
from fedlearn.secagg.enrolment import (
    CLAIM_LIMIT_BYTES,
    Declared,
    Entry,
    entries_from_bytes,
    entries_to_bytes,
    identities_of,
)
from fedlearn.secagg.messages import Reveals, Survivors, from_bytes, to_bytes
from fedlearn.secagg.plan import Plan, Profile, Terms
from fedlearn.secagg.primitives import SeededDraw, new_identity
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import dtype_of
from fedlearn.secagg.server import ServerRound, Stage
from fedlearn.secagg.session import MaskingSession
from tests.support.secagg_world import sparse_graphs

NAMES = ("ada", "bob", "cyd", "dee")
PLAN = Plan(Encoding(length=5, clients=4, clip_l2=1.0))
SUBJECT = b"model and configuration"
AT, NEXT = AttemptId(2, 1), AttemptId(3, 1)


def session_of(name, draw=None, enrolment=None):
    key = new_identity(PLAN.suite, SeededDraw(name.encode()))
    made = draw if draw is not None else (lambda _at: os.urandom)
    return MaskingSession("run", Identity(name, key), key.public, enrolment or Declared(), made)


def vector(value=1):
    return np.full(6, value, dtype=dtype_of(32))


class Desk:
    """Four sessions and a server, up to the deliveries of one attempt."""

    def __init__(self, at=AT, sessions=None, plan=PLAN):
        self.sessions = sessions or {name: session_of(name) for name in NAMES}
        entries = {name: entries_from_bytes(s.check_in(at, plan))[0] for name, s in self.sessions.items()}
        self.server = ServerRound(Terms("run", at, plan), identities_of(Declared(), list(entries.values())), SUBJECT)
        for name, entry in entries.items():
            self.server.receive(name, entry.check_in)
        self.server.close()
        self.roster = entries_to_bytes(entries[name] for name in NAMES)
        for name, session in self.sessions.items():
            self.server.receive(name, from_bytes(session.share(at, plan, SUBJECT, self.roster)))
        self.told = {name: to_bytes(message) for name, message in self.server.close().items()}


def breach(call, *args):
    with pytest.raises(SecureAggregationError) as caught:
        call(*args)
    return caught.value.breach


def test_a_whole_attempt_with_every_message_twice():
    desk = Desk()
    for name, session in desk.sessions.items():
        assert session.check_in(AT, PLAN) == session.check_in(AT, PLAN)
        assert session.share(AT, PLAN, SUBJECT, desk.roster) == session.share(AT, PLAN, SUBJECT, desk.roster)
        session.expect(AT, SUBJECT, desk.told[name])
        session.expect(AT, SUBJECT, desk.told[name])
        desk.server.receive(name, from_bytes(session.mask(AT, SUBJECT, desk.told[name], vector())))
    for name, message in desk.server.close().items():
        session, body = desk.sessions[name], to_bytes(message)
        opening = session.open(AT, body)
        assert session.open(AT, body) == opening
        desk.server.receive(name, from_bytes(opening))
    desk.server.close()
    assert desk.server.stage is Stage.OPENED
    assert desk.server.total.integers.tolist() == [4] * 5


def test_a_vector_is_masked_once():
    desk = Desk()
    session = desk.sessions["ada"]
    session.mask(AT, SUBJECT, desk.told["ada"], vector())
    with pytest.raises(LocalProtocolError):
        session.mask(AT, SUBJECT, desk.told["ada"], vector(2))


def test_another_process_that_has_the_seed_opens_what_the_first_one_masked():
    def draw(_at):
        return SeededDraw(b"the same seed")

    sessions = {name: session_of(name, draw if name == "ada" else None) for name in NAMES}
    desk = Desk(sessions=sessions)
    for name, session in sessions.items():
        desk.server.receive(name, from_bytes(session.mask(AT, SUBJECT, desk.told[name], vector())))
    survivors = {name: to_bytes(message) for name, message in desk.server.close().items()}
    again = session_of("ada", draw)
    again.share(AT, PLAN, SUBJECT, desk.roster)
    again.skip_masking(AT, SUBJECT, desk.told["ada"])
    assert again.open(AT, survivors["ada"]) == sessions["ada"].open(AT, survivors["ada"])


def test_a_later_attempt_ends_the_earlier_ones():
    desk = Desk()
    session = desk.sessions["ada"]
    session.check_in(NEXT, PLAN)
    Desk(NEXT, desk.sessions)
    assert breach(session.mask, AT, SUBJECT, desk.told["ada"], vector()) is Breach.UNEXPECTED
    assert breach(session.check_in, AT, PLAN) is Breach.REPLAY
    assert breach(session.share, AT, PLAN, SUBJECT, desk.roster) is Breach.REPLAY
    assert "2 open" not in repr(session)


def test_who_was_restarted_holds_no_keys():
    desk = Desk()
    again = session_of("ada")
    assert breach(again.mask, AT, SUBJECT, desk.told["ada"], vector()) is Breach.UNEXPECTED
    assert breach(again.open, AT, b"") is Breach.UNEXPECTED
    assert breach(again.share, AT, PLAN, SUBJECT, desk.roster) is Breach.SELF_CHANGED


def test_another_roster_or_plan_is_refused():
    desk = Desk()
    other = entries_to_bytes(entry for entry in entries_from_bytes(desk.roster) if entry.check_in.client != "dee")
    assert breach(desk.sessions["ada"].share, AT, PLAN, SUBJECT, other) is Breach.EQUIVOCATION
    larger = Plan(Encoding(length=6, clients=4, clip_l2=1.0))
    fresh = session_of("bob")
    fresh.check_in(AT, PLAN)
    assert breach(fresh.check_in, AT, larger) is Breach.EQUIVOCATION


def test_another_model_than_the_keys_are_bound_to_is_refused():
    """A server that sends one client a model of its own, to find that client's update in the sum."""
    desk = Desk()
    session = desk.sessions["ada"]
    assert breach(session.expect, AT, b"another model", desk.told["ada"]) is Breach.EQUIVOCATION
    assert breach(session.mask, AT, b"another model", desk.told["ada"], vector()) is Breach.EQUIVOCATION
    assert breach(session.share, AT, PLAN, b"another model", desk.roster) is Breach.EQUIVOCATION


def test_who_is_not_vouched_for_ends_the_roster():
    class Nobody(Declared):
        def identity(self, client, claim):
            if client == "dee":
                raise SecureAggregationError(Breach.NOT_ENROLLED, "never heard of", culprits=("dee",))
            return claim

    sessions = {name: session_of(name, enrolment=Nobody()) for name in NAMES}
    with pytest.raises(SecureAggregationError) as caught:
        Desk(sessions=sessions)
    assert caught.value.breach is Breach.NOT_ENROLLED


def test_a_client_holds_keys_of_few_attempts():
    session = session_of("ada")
    for attempt in range(1, 30):
        session.check_in(AttemptId(1, attempt), PLAN)
    assert "4 open" in repr(session)
    session.close()
    assert "0 open" in repr(session)


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05hello"])
def test_what_is_no_roster_is_refused(data):
    assert breach(entries_from_bytes, data) is Breach.MALFORMED


def test_a_claim_has_a_limit():
    entry = entries_from_bytes(session_of("ada").check_in(AT, PLAN))[0]
    large = entries_to_bytes([Entry(entry.check_in, bytes(CLAIM_LIMIT_BYTES + 1))])
    assert breach(entries_from_bytes, large) is Breach.TOO_LARGE


def test_a_clients_message_is_none_of_the_servers():
    desk = Desk()
    mine = to_bytes(entries_from_bytes(desk.roster)[0].check_in)
    assert breach(desk.sessions["ada"].expect, AT, SUBJECT, mine) is Breach.UNEXPECTED


AGREED = replace(PLAN, profile=Profile.MALICIOUS)


def agreeing():
    """A desk whose survivors are known, and what each is told of them."""
    desk = Desk(plan=AGREED)
    for name, session in desk.sessions.items():
        desk.server.receive(name, from_bytes(session.mask(AT, SUBJECT, desk.told[name], vector())))
    return desk, {name: to_bytes(message) for name, message in desk.server.close().items()}


def test_survivors_are_agreed_upon_before_they_open_with_every_message_twice():
    desk, survivors = agreeing()
    for name, session in desk.sessions.items():
        agreement = session.agree(AT, survivors[name])
        assert session.agree(AT, survivors[name]) == agreement
        desk.server.receive(name, from_bytes(agreement))
    for name, message in desk.server.close().items():
        session, body = desk.sessions[name], to_bytes(message)
        opening = session.open(AT, body)
        assert session.agree(AT, survivors[name])
        assert session.open(AT, body) == opening
        desk.server.receive(name, from_bytes(opening))
    desk.server.close()
    assert desk.server.total.integers.tolist() == [4] * 5


def test_a_second_set_of_survivors_is_not_signed():
    desk, survivors = agreeing()
    session, told = desk.sessions["ada"], from_bytes(survivors["ada"])
    session.agree(AT, survivors["ada"])
    fewer = Survivors(told.survivors & ~8, told.inclusions[:2])
    assert breach(session.agree, AT, to_bytes(fewer)) is Breach.EQUIVOCATION
    assert breach(session.agree, AT, survivors["ada"]) is Breach.UNEXPECTED, "the attempt is over for it"


def test_nothing_is_opened_on_the_servers_word_where_it_is_agreed_upon():
    desk, survivors = agreeing()
    for name in ("ada", "bob"):
        assert breach(desk.sessions[name].open, AT, survivors[name]) is Breach.UNEXPECTED
        assert desk.sessions[name]._open[AT].round.state is ClientState.MASKED
    session = desk.sessions["cyd"]
    session.agree(AT, survivors["cyd"])
    assert breach(session.open, AT, survivors["cyd"]) is Breach.UNEXPECTED


def test_nothing_is_signed_where_nothing_is_agreed_upon():
    """Else an opening could leave under another name."""
    desk = Desk()
    session = desk.sessions["ada"]
    for name, other in desk.sessions.items():
        desk.server.receive(name, from_bytes(other.mask(AT, SUBJECT, desk.told[name], vector())))
    survivors = to_bytes(desk.server.close()["ada"])
    assert breach(session.agree, AT, survivors) is Breach.UNEXPECTED
    assert session.open(AT, survivors)


def test_nonces_are_asked_for_above_the_limit_of_complete_graphs():
    names = [f"site-{number:02d}" for number in range(12)]
    plan = replace(PLAN, encoding=Encoding(length=5, clients=12, clip_l2=1.0), adversarial=0.0)
    with sparse_graphs(above=10):
        sessions = {name: session_of(name) for name in names}
        entries = [entries_from_bytes(session.check_in(AT, plan))[0] for session in sessions.values()]
        roster = entries_to_bytes(entries)
        server = ServerRound(Terms("run", AT, plan), identities_of(Declared(), entries), SUBJECT)
        for entry in entries:
            server.receive(entry.check_in.client, entry.check_in)
        server.close()
        for name, session in sessions.items():
            nonce = session.reveal(AT, plan, SUBJECT, roster)
            assert session.reveal(AT, plan, SUBJECT, roster) == nonce
            server.receive(name, from_bytes(nonce))
        for name, message in server.close().items():
            session, body = sessions[name], to_bytes(message)
            assert breach(session.share, AT, plan, b"another model", body) is Breach.EQUIVOCATION
            shares = session.share(AT, plan, SUBJECT, body)
            assert session.share(AT, plan, SUBJECT, body) == shares
            assert session.reveal(AT, plan, SUBJECT, roster)
            server.receive(name, from_bytes(shares))
        server.close()
        assert server.stage is Stage.MASK
        assert (
            breach(sessions[names[0]].share, AT, plan, SUBJECT, to_bytes(Reveals((b"",) * 12))) is Breach.EQUIVOCATION
        )
