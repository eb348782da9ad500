"""The live view, fed with events by hand."""

import dataclasses
import io
import sys

import pytest

from fedlearn import events
from fedlearn.cli.view import MOST_OUT, MOST_ROWS, MOST_TRACES, RunView
from fedlearn.simulation.failures import ClientFailure


def start(rounds=3, done=0):
    return events.RunStarted("run-1", "heart", rounds, done, ("a", "b"), 401, "auc")


def finished(number):
    return events.RoundFinished("run-1", number, 1, 2, 0, 0.5, 0.25, 1.0)


def scored(number, auc):
    return events.Evaluated("run-1", number, {"auc": auc}, {"a": {"auc": auc}, "b": {"auc": auc}})


def shown(capsys, *feed, **options):
    with RunView(bar=False, **options) as view:
        for event in feed:
            view.take(event)
    return view, capsys.readouterr().out.splitlines()


def test_a_row_waits_for_its_score_and_is_shown_without_one(capsys):
    feed = [start(), finished(1), scored(1, 0.75), finished(2), events.RoundStarted("run-1", 3, 1, 2), finished(3)]
    view, lines = shown(capsys, *feed, events.RunFinished("run-1", 3, 1.5, "00"))
    assert [line.split() for line in lines[2:]] == [
        ["1", "2", "0.50", "0.2500", "0.7500"],
        ["2", "2", "0.50", "0.2500", "-"],
        ["3", "2", "0.50", "0.2500", "-"],
    ]
    assert [row.get("auc") for row in view.round_rows] == [0.75, None, None]
    assert isinstance(view.ended, events.RunFinished)


def test_the_last_row_is_shown_when_the_view_is_left_early(capsys):
    _, lines = shown(capsys, start(), finished(1))
    assert lines[-1].split()[0] == "1"


def test_who_refuses_is_named_once_and_waiting_is_not_silent(capsys):
    feed = [
        events.ClientRefused("run-1", "c", "policy: tasks: no\n  ask for another", final=True),
        events.RunWaiting("run-1", 1, 2, 600.0),
        start(),
        events.ClientDropped("run-1", 1, "b", "budget: spent", refused=True),
        events.ClientDropped("run-1", 2, "b", "budget: spent", refused=True),
        events.ClientRefused("run-1", "c", "policy: tasks: no\n  ask for another", final=True),
        events.ClientRefused("run-1", "d", "no reply within 120 s"),
    ]
    _, lines = shown(capsys, *feed)
    assert lines[:3] == [
        "  refused: c: policy: tasks: no",
        "      ask for another",
        "  waiting for clients: 1 of 2 are here, 10 min are left for the others",
    ]
    assert lines[5:] == ["  refused in round 1: b: budget: spent", "  not taking part yet: d: no reply within 120 s"]


def test_what_went_wrong_is_said_where_it_happened(capsys):
    feed = [
        start(),
        events.ClientDropped("run-1", 1, "b", "vanished"),
        events.RoundVoid("run-1", 1, 1, "1 update, 2 needed"),
        events.RoundStarted("run-1", 1, 2, 2),
    ]
    _, lines = shown(capsys, *feed)
    assert lines[2:] == [
        "  round 1: b is out: vanished",
        "  round 1: void: 1 update, 2 needed",
        "  round 1: attempt 2",
    ]


def test_a_resumed_run_keeps_its_header(capsys):
    _, lines = shown(capsys, start(), finished(1), start(done=1), finished(2))
    assert [line for line in lines if line.startswith("heart")] == lines[:1]
    assert "  resumed after round 1" in lines


def test_silent_without_rows(capsys):
    view, lines = shown(capsys, start(), finished(1), scored(1, 0.5), rows=False)
    assert lines == []
    assert view.round_rows[0]["auc"] == 0.5


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("rounds", [30, 1000])
def test_a_terminal_gets_some_rows_of_a_long_run_and_a_bar(monkeypatch, rounds):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with RunView() as view:
        view.take(start(rounds))
        for number in range(1, rounds + 1):
            view.take(finished(number))
            view.take(scored(number, 0.5))
    rows = [line.replace("\x1b[2K", "") for line in err.getvalue().splitlines() if "0.2500" in line]
    assert len(rows) <= MOST_ROWS + 1
    assert rows[-1].split()[0] == str(rounds)
    assert out.getvalue() == ""
    assert "auc 0.5000" in err.getvalue()


def test_a_pipe_gets_every_row_though_the_bar_is_on_a_terminal(capsys, monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with RunView() as view:
        view.take(start(1000))
        for number in range(1, 1001):
            view.take(finished(number))
    assert len([line for line in capsys.readouterr().out.splitlines() if "0.2500" in line]) == 1000
    assert "0.2500" not in err.getvalue()


def test_a_few_of_those_that_drop_out_are_named(capsys):
    out = [events.ClientDropped("run-1", 1, f"c{i}", "no reply") for i in range(MOST_OUT + 3)]
    _, lines = shown(capsys, start(), events.RoundStarted("run-1", 1, 1, 10), *out, finished(1), scored(1, 0.5))
    assert [line for line in lines if "is out" in line] == [
        f"  round 1: c{i} is out: no reply" for i in range(MOST_OUT)
    ]
    assert "  round 1: 3 more are out" in lines


def test_a_simulated_world_is_in_the_row(capsys):
    world = {
        "virtual_seconds": 61.5,
        "bytes_up": 5e5,
        "bytes_down": 2e6,
        "unavailable": 7,
        "dropouts": 0,
        "stragglers": 2,
    }
    late = events.ClientDropped("run-1", 1, "c", "too late", virtual=True)
    done = dataclasses.replace(finished(1), environment=world)
    view, lines = shown(capsys, start(), events.RoundStarted("run-1", 1, 1, 10), late, done, scored(1, 0.5))
    assert not any("is out" in line for line in lines)
    assert lines[-1].endswith("61.5 s virtual, 2.5 MB, 7 away, 2 late")
    assert view.round_rows[0]["stragglers"] == 2


def test_the_bar_moves_within_a_round_and_says_how_fast(monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr("fedlearn.cli.view.REDRAW_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    with RunView() as view:
        view.take(start(4))
        for number in (1, 2):
            view.take(events.RoundStarted("run-1", number, 1, 2))
            view.take(events.ClientFinished("run-1", number, "a", {}))
            assert view._progress.tasks[0].completed == number - 0.5
            view.take(finished(number))
            view.take(scored(number, 0.5))
        assert view._progress.tasks[0].fields["note"] == "2/4  auc 0.5000  4 clients/s"
    assert view.clients_per_s == 4.0


def test_a_resumed_run_counts_its_own_work_alone(capsys):
    view, _ = shown(capsys, start(done=1), finished(2), rows=False)
    assert view.rounds_done == 2
    assert view.clients_per_s == 4.0


def test_only_the_first_tracebacks_are_shown(capsys):
    trace = "Traceback (most recent call last):\n  File ...\nValueError: no\n"
    with RunView(bar=False) as view:
        view.take(start())
        for client in "abcde":
            view.client_raised(ClientFailure(client, 1, "train", "ValueError: no", trace, (1, 2), 2))
    err = capsys.readouterr().err
    assert err.count("Traceback") == MOST_TRACES
    assert "client a raised in round 1 (train):\n  Traceback" in err
