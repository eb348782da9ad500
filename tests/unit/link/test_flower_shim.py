"""Flower's private touchpoints, one by one: a release that moves them fails here, by name."""

import importlib.metadata

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedlearn.errors import RemoteProtocolError
from fedlearn.link import flower
from fedlearn.link.grid import LinkGrid

INFLATED = RecordDict(
    {
        "arrays": ArrayRecord({"w": Array(np.arange(6.0).reshape(2, 3)), "b": Array(np.float32([1]))}),
        "config": ConfigRecord({"lr": 0.1, "names": ["a", "b"], "flag": True, "raw": b"\x00\xff"}),
        "metrics": MetricRecord({"loss": 0.5, "counts": [1, 2**63]}),
        "more": ArrayRecord({"c": Array(np.zeros((0, 3)))}),
    }
)


@pytest.fixture
def message():
    flower.ensure_identity(11)
    return Message(INFLATED, 5, "train.step", ttl=60.0, group_id="3")


def test_flwr_is_a_version_that_the_shim_was_tried_with():
    major, minor = importlib.metadata.version("flwr").split(".")[:2]
    assert (int(major), int(minor)) in {(1, 41), (1, 42)}


def test_the_grid_implements_all_that_flower_declares():
    assert Grid.__abstractmethods__ == {
        "create_message",
        "get_node_ids",
        "pull_messages",
        "push_messages",
        "run",
        "send_and_receive",
        "set_run",
    }
    assert not LinkGrid.__abstractmethods__


def test_task_identity_is_what_a_message_needs():
    flower.ensure_identity(77)
    assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (77, flower.SERVER_NODE_ID, 0)
    assert Message(RecordDict(), 5, "train").metadata.run_id == 77


def test_metadata_has_the_fields_that_are_stamped(message):
    values = {
        "message_id": "m1",
        "run_id": 3,
        "src_node_id": 4,
        "dst_node_id": 6,
        "reply_to_message_id": "m0",
        "created_at": 1.5,
        "ttl": 2.5,
    }
    flower.stamp(message, **values)
    assert {name: getattr(message.metadata, name) for name in values} == values
    with pytest.raises(AttributeError, match="not supported"):
        flower.stamp(message, no_such_field=1)


def test_an_empty_run_knows_its_id():
    run = flower.empty_run(9)
    assert isinstance(run, Run)
    assert run.run_id == 9


def test_a_message_comes_back_as_it_went(message):
    flower.stamp(message, message_id="m1")
    wire = flower.encode(message)
    back = flower.decode(wire.metadata, wire.buffers)
    assert vars(back.metadata) == vars(message.metadata)
    assert list(back.content) == list(message.content)
    for name, record in message.content.items():
        assert dict(back.content[name]) == dict(record)
        assert list(back.content[name]) == list(record)


def test_array_bytes_are_neither_copied_nor_in_the_metadata(message):
    big = Array("uint8", (100_000,), "numpy.ndarray", bytes(100_000))
    message.content = RecordDict({"a": ArrayRecord({"x": big})})
    wire = flower.encode(message)
    assert len(wire.metadata) < 300
    assert wire.buffers[0] is big.data
    assert flower.decode(wire.metadata, wire.buffers).content["a"]["x"].data is big.data


def test_an_error_comes_back_as_it_went(message):
    flower.stamp(message, message_id="m1")
    reply = flower.error_reply(message, flower.ERROR_UNREACHABLE, "gone")
    wire = flower.encode(reply)
    back = flower.decode(wire.metadata, wire.buffers)
    assert back.error == Error(flower.ERROR_UNREACHABLE, "gone")
    assert back.metadata.reply_to_message_id == "m1"
    assert back.metadata.src_node_id == 5
    assert flower.as_error(wire.metadata, 1, "x") is None


def test_a_reply_is_turned_into_an_error(message):
    wire = flower.encode(message)
    back = flower.decode(flower.as_error(wire.metadata, flower.ERROR_CLIENT_RAISED, "too big"), ())
    assert back.error.reason == "too big"


def test_another_function_is_asked_under_the_same_metadata(message):
    kind = message.metadata.message_type
    asked = flower.as_type(message, "query.other", RecordDict())
    assert not list(asked.content)
    assert asked.metadata.message_type == "query.other"
    assert asked.metadata.message_id == message.metadata.message_id
    assert asked.metadata.src_node_id == message.metadata.src_node_id
    assert message.metadata.message_type == kind


def test_a_pending_message_holds_no_arrays(message):
    assert not list(flower.without_content(message).content)
    assert list(message.content)


@pytest.mark.parametrize("metadata", [b"\xff\xff", b"", b"\x0a\x02\x10\x01"])
def test_what_is_no_message_is_refused(metadata):
    with pytest.raises(RemoteProtocolError):
        flower.decode(metadata, ())


def test_another_number_of_buffers_is_refused(message):
    wire = flower.encode(message)
    with pytest.raises(RemoteProtocolError, match="2 buffers for 3 arrays"):
        flower.decode(wire.metadata, wire.buffers[:2])


def test_node_ids_are_the_same_for_ever_and_no_servers():
    assert flower.node_id_of("cleveland") == 4261535890344720705
    ids = {flower.node_id_of(f"client-{i}") for i in range(10_000)}
    assert len(ids) == 10_000
    assert all(1 < i < 2**63 for i in ids)
