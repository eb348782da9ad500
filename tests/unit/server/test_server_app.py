"""The real ServerApp and ClientApps over a grid in memory: the simulation's bytes, whatever the order and whatever goes wrong."""

from __future__ import annotations

import functools
import math
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

import fedlearn
from client.app import app as client_app
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.errors import RunFailedError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import RECORD, decode_request, to_record
from fedlearn.link import flower
from tests.support.memory_grid import MemoryGrid, nodes_of
from tests.support.runs import Run, run_server_app
from tests.support.tiny_task import CLIENTS, tiny_study

STRATEGIES = ("fedavg", "fedadam", "scaffold", "ditto", "median")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ends_with_the_simulations_bytes_in_any_order(strategy):
    study = tiny_study(f"strategy.name={strategy}")
    expected = fedlearn.simulate(study)
    for order in range(3):
        run = run_server_app(study, MemoryGrid(nodes_of(CLIENTS), order))
        assert digest(run.model) == digest(expected.weights)
        last = run.of(events.Evaluated)[-1]
        assert last.mean["accuracy"] == expected.history.final()
        assert last.mean["loss"] == expected.history.final("loss")


def test_cohorts_are_the_simulations():
    study = tiny_study("cohort.size=2", "rounds=5", "evaluate.clients=2", "evaluate.every=2")
    grid = MemoryGrid(nodes_of(CLIENTS))
    run = run_server_app(study, grid)
    assert digest(run.model) == digest(fedlearn.simulate(study).weights)
    assert [event.round for event in run.of(events.Evaluated)] == [2, 4, 5]
    assert {len(event.clients) for event in run.of(events.Evaluated)} == {2}
    assert (
        len({tuple(sorted(e.client for e in run.of(events.ClientFinished) if e.round == r)) for r in range(1, 6)}) > 1
    )


def test_the_study_that_travels_is_the_one_that_ran():
    study = tiny_study("train.lr=0.05", "strategy.name=fedprox", "strategy.options={mu=0.5}")
    run = run_server_app(study, MemoryGrid(nodes_of(CLIENTS)))
    assert run.finished.study == study


def test_a_simulated_environment_is_ignored_and_said_to_be(caplog):
    plain, world = tiny_study(), tiny_study("environment.dropout=0.9", "environment.deadline_s=0.001")
    run = run_server_app(world, MemoryGrid(nodes_of(CLIENTS)))
    assert digest(run.model) == digest(fedlearn.simulate(plain).weights)
    assert "[environment] is for simulations and is ignored" in caplog.text


# What a client, or somebody in its place, can send.


@functools.cache
def without_bob() -> str:
    """The model when bob does not compute in round 2: what every bad update must come to."""
    return digest(run_server_app(tiny_study(), MemoryGrid(nodes_of(CLIENTS), app=absent("bob", 2))).model)


def lose(client, round_, exchange=Exchange.TRAIN):
    return change(client, round_, lambda reply: None, exchange)


def change(client, round_, make, exchange=Exchange.TRAIN):
    """A fault that puts something in place of one client's reply in one round."""

    def fault(request: Message, reply: Message):
        asked = decode_request(request.content)
        here = request.metadata.dst_node_id in nodes_of([client])
        if not here or asked.exchange is not exchange or asked.round != round_:
            return reply
        arrived = make(reply)
        if arrived is not None:
            flower.stamp(arrived, reply_to_message_id=request.metadata.message_id)
        return arrived

    return fault


def answer(reply: Message, content: RecordDict) -> Message:
    reply.content = content
    return reply


def delta(reply: Message) -> dict:
    return {
        name: np.load(BytesIO(array.data), allow_pickle=False) for name, array in reply.content["private.delta"].items()
    }


def with_delta(make):
    def bad(reply):
        reply.content["private.delta"] = to_record(make(delta(reply)))
        return reply

    return bad


def with_array(array: FlowerArray):
    def bad(reply):
        reply.content["private.delta"]["weight"] = array
        return reply

    return bad


def with_record(key, record):
    def bad(reply):
        if record is None:
            del reply.content[key]
        else:
            reply.content[key] = record
        return reply

    return bad


def npy(header: bytes, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def raw(data: bytes, stype: str = "numpy.ndarray") -> FlowerArray:
    return FlowerArray(dtype="float32", shape=(2, 3), stype=stype, data=data)


def archive() -> bytes:
    out = BytesIO()
    np.savez(out, np.zeros(3))
    return out.getvalue()


def pickled() -> bytes:
    out = BytesIO()
    np.save(out, np.array([print], dtype=object), allow_pickle=True)
    return out.getvalue()


GIANT = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }\n"
BAD = {
    "an error": (lambda r: Message(Error(1, "out of memory"), reply_to=r), "out of memory"),
    "nan": (with_delta(lambda d: {**d, "bias": d["bias"] * np.float32("nan")}), "2 value(s) that are not finite"),
    "infinity": (with_delta(lambda d: {**d, "bias": d["bias"] + np.float32("inf")}), "not finite"),
    "too large": (with_delta(lambda d: {**d, "bias": d["bias"] + np.float32(1e30)}), "exceeds the sum's headroom"),
    "other shape": (with_delta(lambda d: {**d, "bias": np.zeros(3, np.float32)}), "'bias' is float32[3], expected"),
    "other dtype": (
        with_delta(lambda d: {**d, "bias": d["bias"].astype(np.float64)}),
        "float64[2], expected float32[2]",
    ),
    "missing array": (with_delta(lambda d: {"bias": d["bias"]}), "missing arrays ['weight']"),
    "another model": (with_delta(lambda d: {**d, "layer": d["bias"]}), "unexpected arrays ['layer']"),
    "no delta": (with_record("private.delta", None), "releases [], expected ['delta']"),
    "one release too many": (with_record("private.control", ArrayRecord()), "['control', 'delta'], expected ['delta']"),
    "delta is no arrays": (with_record("private.delta", ConfigRecord({"x": 1})), "is ConfigRecord, expected arrays"),
    "no record": (with_record(RECORD, None), "expected one of fedlearn's messages"),
    "record of another kind": (with_record(RECORD, MetricRecord({"format": 1})), "expected one of fedlearn's messages"),
    "other format": (with_record(RECORD, ConfigRecord({"format": 2, "examples": 3})), "format 2, expected 1"),
    "no examples": (with_record(RECORD, ConfigRecord({"format": 1})), "examples is NoneType"),
    "examples are text": (with_record(RECORD, ConfigRecord({"format": 1, "examples": "3"})), "examples is str"),
    "true examples": (with_record(RECORD, ConfigRecord({"format": 1, "examples": True})), "examples is bool"),
    "zero examples": (with_record(RECORD, ConfigRecord({"format": 1, "examples": 0})), "0 training examples"),
    "negative examples": (with_record(RECORD, ConfigRecord({"format": 1, "examples": -4})), "-4 training examples"),
    "a claim to all weight": (
        with_record(RECORD, ConfigRecord({"format": 1, "examples": 2**62})),
        "training examples, expected 1 to",
    ),
    "facts of another kind": (with_record("facts", ConfigRecord({})), "'facts' is ConfigRecord"),
    "countless facts": (with_record("facts", MetricRecord({f"m{i}": 1.0 for i in range(1001)})), "1001 metrics"),
    "a fact's name": (with_record("facts", MetricRecord({"m" * 201: 1.0})), "limits are"),
    "empty": (lambda r: answer(r, RecordDict()), "expected one of fedlearn's messages"),
    "a picture": (with_array(raw(b"\x89PNG\r\n\x1a\n" + bytes(200))), "cannot be read"),
    "no bytes": (with_array(raw(b"")), "cannot be read"),
    "half a header": (with_array(raw(npy(GIANT)[:40])), "cannot be read"),
    "a giant": (with_array(raw(npy(GIANT, bytes(64)))), "cannot be read: 16 values for shape [1099511627776, 1024]"),
    "negative shape": (with_array(raw(npy(GIANT.replace(b"1099511627776", b"-1"), bytes(64)))), "cannot be read"),
    "code for a shape": (with_array(raw(npy(b"__import__('os').abort()"))), "cannot be read"),
    "endless digits": (with_array(raw(npy(GIANT[:60] + b"1" * 900 + b"\n"))), "cannot be read"),
    "deep header": (with_array(raw(npy(b"(" * 9000))), "cannot be read"),
    "an archive": (with_array(raw(archive())), "cannot be read"),
    "a pickle": (with_array(raw(pickled())), "cannot be read"),
    "torch's format": (with_array(raw(b"x", stype="torch")), "format 'torch', expected numpy.ndarray"),
    "text": (with_delta(lambda d: {**d, "bias": np.array(["a", "b"])}), "got dtype <U1"),
    "the other byte order": (with_delta(lambda d: {**d, "bias": d["bias"].astype(">f4")}), "got dtype >f4"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_update_costs_its_client_the_round_and_nothing_else(name):
    make, reason = BAD[name]
    run = run_server_app(tiny_study(), MemoryGrid(nodes_of(CLIENTS), fault=change("bob", 2, make)))
    (dropped,) = run.of(events.ClientDropped)
    assert (dropped.client, dropped.round) == ("bob", 2)
    assert reason in dropped.reason
    assert digest(run.model) == without_bob()


def test_a_late_reply_costs_its_client_the_round():
    study = tiny_study("runtime.deadline_s=1.5")
    run = run_server_app(study, MemoryGrid(nodes_of(CLIENTS), fault=lose("bob", 2)))
    (dropped,) = run.of(events.ClientDropped)
    assert dropped.reason == "no reply within 1.5 s"
    assert digest(run.model) == without_bob()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (MetricRecord({"accuracy": math.inf, "loss": -math.inf}), math.nan),
        (MetricRecord({"accuracy": 1.7e308}), math.nan),
        (MetricRecord({"accuracy": [0.5]}), math.nan),
        (MetricRecord({"accuracy": math.nan}), math.nan),
    ],
)
def test_metrics_are_claims_that_cannot_end_a_run(record, expected):
    def fault(request, reply):
        return with_record("metrics", record)(reply) if "metrics" in reply.content else reply

    run = run_server_app(tiny_study("rounds=1"), MemoryGrid(nodes_of(CLIENTS), fault=fault))
    (evaluated,) = run.of(events.Evaluated)
    assert evaluated.mean.get("accuracy", math.nan) == pytest.approx(expected, nan_ok=True)
    assert digest(run.model) == digest(fedlearn.simulate(tiny_study("rounds=1")).weights)


@pytest.mark.parametrize("examples", [-1, 2**41, "many"])
def test_a_bad_score_leaves_its_client_out(examples):
    bad = with_record(RECORD, ConfigRecord({"format": 1, "examples": examples}))
    fault = change("bob", 1, bad, Exchange.EVALUATE)
    (evaluated,) = run_server_app(tiny_study("rounds=1"), MemoryGrid(nodes_of(CLIENTS), fault=fault)).of(
        events.Evaluated
    )
    assert sorted(evaluated.clients) == ["ada", "cyd", "dee"]


# Who is who.


def test_the_first_of_two_nodes_with_one_name_has_it():
    nodes = nodes_of(CLIENTS)
    honest = min(nodes)
    impostor = max(nodes) + 1
    name = nodes[honest].config["client-id"]
    nodes[impostor] = type(nodes[honest])({"client-id": name})
    run = run_server_app(tiny_study(), MemoryGrid(nodes), client_name=lambda node: str(nodes[node].config["client-id"]))
    assert nodes[impostor].calls == 1, "asked who it is, and for nothing else"
    assert digest(run.model) == digest(fedlearn.simulate(tiny_study()).weights)


def test_a_name_that_is_not_the_certificates_is_refused():
    nodes = nodes_of(CLIENTS)
    names = {node: str(one.config["client-id"]) for node, one in nodes.items()}
    (liar,) = (node for node, name in names.items() if name == "bob")
    study = tiny_study("cohort.wait_for=3")
    run = run_server_app(study, MemoryGrid(nodes), client_name={**names, liar: "eve"}.__getitem__)
    assert run.of(events.RunStarted)[0].clients == ("ada", "cyd", "dee")
    assert nodes[liar].calls == 1


def test_a_node_that_is_not_in_the_study_does_not_take_part():
    run = run_server_app(tiny_study(), MemoryGrid(nodes_of([*CLIENTS, "zoe"])))
    assert run.of(events.RunStarted)[0].clients == CLIENTS


def test_too_few_clients_end_the_run_with_a_reason():
    study = tiny_study("runtime.wait_s=0.02")
    run = Run()
    with pytest.raises(RunFailedError, match=r"3 clients connected within 0\.02 s, needs 4"):
        run_server_app(study, MemoryGrid(nodes_of(CLIENTS[:3])), run=run)
    assert isinstance(run.events[-1], events.RunFailed)
    assert run.finished.model is None


# Attempts that come to nothing.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_void_attempt_leaves_no_trace(strategy):
    """Two updates of round 2 are lost once, so three of four are not reached; the retry ends as if nothing had been."""
    study = tiny_study(f"strategy.name={strategy}", "cohort.minimum=3")
    lost = []

    def fault(request, reply):
        asked = decode_request(request.content)
        if asked.exchange is Exchange.TRAIN and (asked.round, asked.attempt) == (2, 1) and len(lost) < 2:
            lost.append(request)
            return Message(Error(1, "gone"), reply_to=request)
        return reply

    run = run_server_app(study, MemoryGrid(nodes_of(CLIENTS), fault=fault))
    (void,) = run.of(events.RoundVoid)
    assert (void.round, void.attempt, void.reason) == (2, 1, "2 of 4 clients sent, at least 3 needed")
    expected = fedlearn.simulate(study)
    assert digest(run.model) == digest(expected.weights)
    assert run.of(events.Evaluated)[-1].mean["loss"] == expected.history.final("loss")


@pytest.mark.parametrize("strategy", ["scaffold", "ditto"])
def test_memory_moves_on_only_with_a_committed_sum(strategy):
    """An update that was computed and lost equals one that was never computed: the client's memory stays behind too."""
    study = tiny_study(f"strategy.name={strategy}", "rounds=4")
    lost = MemoryGrid(nodes_of(CLIENTS), fault=change("bob", 2, lambda r: Message(Error(1, "gone"), reply_to=r)))
    never = MemoryGrid(nodes_of(CLIENTS), app=absent("bob", 2))
    ends = [run_server_app(study, grid) for grid in (lost, never)]
    assert digest(ends[0].model) == digest(ends[1].model) != digest(fedlearn.simulate(study).weights)
    assert ends[0].of(events.Evaluated)[-1].mean == ends[1].of(events.Evaluated)[-1].mean


def test_a_client_that_lost_its_memory_drops_out_and_says_why():
    study = tiny_study("strategy.name=scaffold")
    nodes = nodes_of(CLIENTS)
    (bob,) = nodes_of(["bob"])

    def forget(message, context):
        if decode_request(message.content).round >= 2 and context.node_id == bob:
            context.state = RecordDict()
        return client_app(message, context)

    run = run_server_app(study, MemoryGrid(nodes, app=forget))
    dropped = run.of(events.ClientDropped)
    assert {(d.client, d.round) for d in dropped} == {("bob", 2), ("bob", 3)}
    assert "the server continues from round 1 attempt 1, this client has no round" in dropped[0].reason


def absent(client, round_):
    def call(message, context):
        asked = decode_request(message.content)
        if asked.exchange is Exchange.TRAIN and asked.round == round_ and context.node_id in nodes_of([client]):
            raise RuntimeError("not here")
        return client_app(message, context)

    return call


def test_a_run_can_be_stopped_between_rounds():
    run = Run()
    run_server_app(
        tiny_study(),
        MemoryGrid(nodes_of(CLIENTS)),
        should_stop=lambda: len(run.of(events.RoundFinished)) == 2,
        run=run,
    )
    assert run.events[-1] == events.RunStopped("run-1", 2)
    assert run.finished.model is None
