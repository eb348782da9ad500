"""Who is asked, when, and again: `GridBackend` on a grid that says only what the test lets it say."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from fedlearn import events
from fedlearn.clock import MockClock
from fedlearn.errors import PolicyRefusedError
from fedlearn.learning import messages
from fedlearn.learning.backend import Failed, Fitted, Work
from fedlearn.learning.messages import RequestEncoder
from fedlearn.learning.update import Update
from fedlearn.link import flower
from server import rounds
from server.refusals import REASON_LIMIT
from server.rounds import GridBackend

WORK = Work(1, 1, ("ada", "bob"), {}, {}, "digest", {}, 0.05)


class Grid:
    """Answers `describe` with a name, a refusal or silence; anything else with silence."""

    def __init__(self, names: dict[int, str | Exception | None]) -> None:
        flower.ensure_identity(1)
        self.names, self.described, self.dropped, self._ready = names, [], [], {}
        self.trained: dict[int, RecordDict | Exception] = {}
        self.told: list[int] = []
        self.clock = MockClock()

    def get_node_ids(self):
        return list(self.names)

    def push_messages(self, outgoing):
        ids = []
        for message in outgoing:
            flower.stamp(message, message_id=flower.new_message_id())
            ids.append(message.metadata.message_id)
            self.told.append(message.metadata.dst_node_id)
            self._answer(message)
        return ids

    def _answer(self, message: Message) -> None:
        if message.metadata.message_type != "query":
            if (content := self.trained.get(message.metadata.dst_node_id)) is not None:
                content = _error(content) if isinstance(content, Exception) else content
                self._ready[message.metadata.message_id] = Message(content, reply_to=message)
            return
        self.described.append(message.metadata.dst_node_id)
        name = self.names[message.metadata.dst_node_id]
        if name is None:
            return
        content = messages.encode_description(name, {}) if isinstance(name, str) else _error(name)
        self._ready[message.metadata.message_id] = Message(content, reply_to=message)

    def wait_messages(self, ids, timeout_s):
        here = [self._ready.pop(i) for i in ids if i in self._ready]
        if not here:
            self.clock.advance(timeout_s)
        return here

    def wait_nodes(self, count, timeout_s):
        self.clock.advance(timeout_s)

    def drop(self, ids):
        self.dropped += ids


def _error(error: Exception) -> Error:
    permanent = getattr(error, "permanent", False)
    return Error(flower.ERROR_REFUSED if permanent else flower.ERROR_CLIENT_RAISED, str(error))


def for_good(text: str) -> PolicyRefusedError:
    error = PolicyRefusedError(text)
    error.permanent = True
    return error


def update() -> RecordDict:
    return messages.encode_update(Update({"delta": {"w": np.zeros(2, np.float32)}}, examples=1))


def backend(grid, **more) -> GridBackend:
    return GridBackend(grid, RequestEncoder("run", "{}", "app"), clock=grid.clock, **more)


def test_newcomers_are_asked_once():
    grid = Grid({5: "bob", 3: "ada"})
    one = backend(grid)
    assert one.clients() == ["ada", "bob"]
    assert one.clients() == ["ada", "bob"]
    assert sorted(grid.described) == [3, 5]


def test_a_node_that_refuses_is_asked_again_after_a_while_only():
    grid = Grid({3: "ada", 5: ValueError("no data here")})
    one = backend(grid)
    assert one.clients() == ["ada"]
    assert [failed.reason for failed in one.refusals] == ["no data here"]
    assert one.clients() == ["ada"]
    assert grid.described.count(5) == 1
    grid.names[5] = "bob"
    grid.clock.advance(rounds.REASK_S)
    assert one.clients() == ["ada", "bob"]
    assert not one.refusals


def test_a_node_that_says_nothing_costs_one_deadline_and_no_more():
    grid = Grid({3: "ada", 5: None})
    one = backend(grid)
    before = grid.clock.monotonic()
    assert one.clients() == ["ada"]
    assert grid.clock.monotonic() - before == rounds.DESCRIBE_S
    for _ in range(3):
        grid.clock.advance(10 * rounds.REASK_S)
        before = grid.clock.monotonic()
        assert one.clients(at_least=1) == ["ada"]
        assert grid.clock.monotonic() == before, "a silent node is not waited for while there are enough others"
    assert one.clients(at_least=2, timeout_s=1.0) == ["ada"]
    assert grid.described.count(5) == 2
    assert len(grid.dropped) == 2, "the grid may forget what nobody waits for"


def test_waiting_ends_when_there_are_enough_or_the_time_is_over():
    grid = Grid({3: "ada"})
    one = backend(grid)
    before = grid.clock.monotonic()
    assert one.clients(at_least=2, timeout_s=90.0) == ["ada"]
    assert grid.clock.monotonic() - before == pytest.approx(90.0)


def test_a_node_that_left_frees_its_name():
    grid = Grid({3: "ada", 5: "bob"})
    one = backend(grid)
    one.clients()
    del grid.names[3]
    assert one.clients() == ["bob"]
    grid.names[9] = "ada"
    assert one.clients() == ["ada", "bob"]
    assert sorted(grid.described) == [3, 5, 9]


def test_a_second_node_of_one_name_is_refused_until_the_first_is_gone():
    grid = Grid({3: "ada", 4: "ada"})
    one = backend(grid)
    assert one.clients() == ["ada"]
    assert "so does another client" in one.refusals[0].reason
    del grid.names[3]
    grid.clock.advance(rounds.REASK_S)
    assert one.clients() == ["ada"]
    assert not one.refusals


@pytest.mark.parametrize("answer", [RecordDict(), messages.encode_description("x" * 300, {})])
def test_an_answer_that_is_not_ours_refuses_its_node(answer, monkeypatch):
    grid = Grid({3: "ada"})
    monkeypatch.setattr(messages, "encode_description", lambda *_: answer)
    one = backend(grid)
    assert one.clients() == []
    assert len(one.refusals) == 1


def test_who_refuses_in_a_round_for_good_is_asked_nothing_more_in_this_run():
    seen: list[events.Event] = []
    grid = Grid({3: "ada", 5: "bob"})
    grid.trained = {3: update(), 5: for_good("budget: spent")}
    one = backend(grid, emit=seen.append)
    one.clients()
    assert one.could_come is None
    gone = Failed("bob", "budget: spent", permanent=True)
    assert sorted(map(repr, one.fit(WORK))) == sorted(
        map(repr, [Fitted("ada", messages.decode_update(update())), gone])
    )
    assert one.could_come == 1
    assert one.refusals == [gone]
    grid.trained[5] = update()
    grid.clock.advance(10 * rounds.REASK_S)
    del grid.names[5]
    assert one.clients(at_least=2, timeout_s=90.0) == ["ada"]
    grid.names[9] = "bob"  # under another number
    assert one.clients(at_least=2, timeout_s=90.0) == ["ada"]
    grid.trained[9] = update()
    assert gone in list(one.fit(WORK)), "where it was drawn all the same, it is not there, and nobody takes its place"
    assert grid.described.count(5) == 1
    assert not [e for e in seen if isinstance(e, events.ClientRefused) and e.client == "bob"], "the round has said it"


def test_whoever_left_is_told_of_the_end_as_the_others_are():
    grid = Grid({3: "ada", 5: "bob"})
    grid.trained = {3: update(), 5: for_good("budget: spent")}
    one = backend(grid)
    one.clients()
    list(one.fit(WORK))
    grid.told.clear()
    one.tell_end(b"over")
    assert sorted(grid.told) == [3, 5]


def test_a_last_update_counts_and_its_client_leaves_when_the_attempt_is_over():
    seen: list[events.Event] = []
    grid = Grid({3: "ada", 5: "bob"})
    grid.trained = {3: update(), 5: messages.with_last(update())}
    one = backend(grid, emit=seen.append)
    one.clients()
    assert {type(reply) for reply in one.fit(WORK)} == {Fitted}
    assert one.could_come == 1
    assert {type(reply) for reply in one.fit(WORK)} == {Fitted}, "what belongs to the attempt is still asked for"
    assert one.clients() == ["ada"]
    reason = "budget: it has no room for an update after that of round 1"
    assert seen == [events.ClientRefused("run", "bob", reason, final=True)]


def test_who_refuses_the_whole_run_is_asked_again_only_while_others_are_missing():
    grid = Grid({3: "ada", 5: for_good("policy: tasks")})
    one = backend(grid)
    for _ in range(3):
        assert one.clients(at_least=1) == ["ada"]
        grid.clock.advance(10 * rounds.REASK_S)
    assert grid.described.count(5) == 1
    assert one.could_come is None, "it never took part"
    grid.names[5] = "bob"  # its policy was changed
    assert one.clients(at_least=2, timeout_s=1.0) == ["ada", "bob"]


def test_waiting_is_said_when_it_begins_when_it_changes_and_now_and_then():
    seen: list[events.Event] = []
    grid = Grid({3: "ada", 5: for_good("policy: tasks\x1b[2J" + "x" * 5_000)})
    backend(grid, emit=seen.append).clients(at_least=3, timeout_s=100.0)
    refused, *waiting = seen
    assert isinstance(refused, events.ClientRefused)
    assert (refused.client, refused.final, len(refused.reason)) == ("node 5", True, REASON_LIMIT)
    assert refused.reason.startswith("policy: tasks?[2Jx")
    assert [(e.here, e.needed) for e in waiting if isinstance(e, events.RunWaiting)] == [(1, 3)] * len(waiting)
    assert [e.left_s for e in waiting if isinstance(e, events.RunWaiting)] == [100.0, 90.0, 70.0, 30.0]


def test_each_client_of_a_cohort_gets_exactly_one_answer():
    grid = Grid({3: "ada"})
    one = backend(grid)
    one.clients()
    replies = list(one.fit(WORK))
    assert replies == [Failed("bob", "not connected"), Failed("ada", "no reply within 0.05 s")]
    assert len(grid.dropped) == 1


def test_a_loop_that_stops_listening_lets_the_grid_forget():
    grid = Grid({3: "ada", 5: "bob"})
    one = backend(grid)
    one.clients()
    replies = one.fit(WORK)
    next(replies)
    replies.close()
    assert len(grid.dropped) <= 2
