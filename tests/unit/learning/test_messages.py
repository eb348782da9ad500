"""What travels: requests and replies come back as they were, and what is not one of ours is refused."""

from __future__ import annotations

import math
from io import BytesIO

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.arrays import DTYPES, specs_of
from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Said, Work
from fedlearn.learning.update import Update

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
ARRAYS = st.dictionaries(
    NAMES,
    hnp.arrays(
        st.sampled_from(sorted(DTYPES)).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    ),
    max_size=3,
)
METRICS = st.dictionaries(NAMES, st.floats(), max_size=3)


def sent(content: RecordDict) -> RecordDict:
    """Through Flower's protobuf and back."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def same(a, b) -> bool:
    return specs_of(a) == specs_of(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)


def close(a, b) -> bool:
    return set(a) == set(b) and all(a[k] == b[k] or (math.isnan(a[k]) and math.isnan(b[k])) for k in a)


@given(ARRAYS, ARRAYS, st.dictionaries(st.sampled_from("ab"), st.tuples(st.integers(1, 99), st.integers(1, 9))))
@settings(deadline=None)
def test_requests_come_back(model, shared, bases):
    work = Work(7, 2, ("a", "b"), model, shared, "digest", bases, 60.0)
    encoder = messages.RequestEncoder("run", '{"study":1}', "app")
    for exchange in (Exchange.TRAIN, Exchange.EVALUATE):
        requests = encoder.encode(exchange, work)
        assert set(requests) == {"a", "b"}
        assert requests["a"]["model"] is requests["b"]["model"], "encoded once"
        for client, content in requests.items():
            back = messages.decode_request(sent(content))
            assert (back.run, back.exchange, back.study, back.app) == ("run", exchange, '{"study":1}', "app")
            assert (back.round, back.attempt, back.model_digest, back.base) == (7, 2, "digest", bases.get(client))
            assert same(back.model, model)
            assert same(back.shared, shared)


@given(ARRAYS, ARRAYS)
@settings(deadline=None)
def test_a_model_that_rides_on_shares_is_an_apps_training(model, shared):
    work = Work(7, 2, ("a",), model, shared, "digest", {"a": (6, 1)}, 60.0)
    encoder = messages.RequestEncoder("run", '{"study":1}', "app", model_with_shares=True)

    def encoded(exchange, bodies):
        return sent(encoder.encode(exchange, work, bodies, 9 if bodies else 0)["a"])

    asked = encoded(Exchange.SHARE, {"a": b"roster"})
    assert messages.decode_request(asked).body == b"roster"
    back = messages.decode_request(messages.as_training(asked))
    assert (back.exchange, back.body, back.length) == (Exchange.TRAIN, b"", 9)
    assert same(back.model, model)
    assert same(back.shared, shared)
    assert (back.round, back.attempt, back.model_digest, back.base) == (7, 2, "digest", (6, 1))
    assert messages.decode_facts(asked).exchange is Exchange.SHARE, "the message itself is left as it is"
    assert not messages.brings_model(encoded(Exchange.TRAIN, {"a": b"sealed"}))
    assert messages.brings_model(encoded(Exchange.TRAIN, None)), "of a plain round"
    assert messages.brings_model(encoded(Exchange.EVALUATE, None))


def test_the_first_question_carries_no_model():
    back = messages.decode_request(sent(messages.RequestEncoder("run", "{}", "app").describe()))
    assert back == messages.Request("run", Exchange.DESCRIBE, "{}", "app")


@given(st.dictionaries(NAMES, ARRAYS, max_size=2), st.integers(0, 2**40), METRICS)
@settings(deadline=None)
def test_updates_come_back(private, examples, facts):
    back = messages.decode_update(sent(messages.encode_update(Update(private, examples, facts))))
    assert set(back.private) == set(private)
    assert all(same(back.private[name], private[name]) for name in private)
    assert back.examples == examples
    assert close(back.facts, facts)


@given(METRICS, st.integers(0, 2**40))
def test_scores_come_back(metrics, examples):
    back = messages.decode_scores("c", sent(messages.encode_scores(metrics, examples)))
    assert (back.client, back.examples) == ("c", examples)
    assert close(back.metrics, metrics)


def test_what_rides_along_with_an_answer_keeps_what_is_there():
    said = messages.with_last(messages.with_entry(messages.encode_said(b"vector"), b"keys"))
    assert messages.is_last(said)
    assert messages.decode_said("ada", said) == Said("ada", b"vector", b"keys")
    assert not messages.is_last(messages.encode_said(b"vector"))
    for odd in (RecordDict(), RecordDict({messages.RECORD: ConfigRecord({"last": "yes"})})):
        assert not messages.is_last(odd)


def test_descriptions_come_back():
    assert (
        messages.decode_description(sent(messages.encode_description("va-long-beach", {"rows": 3}))) == "va-long-beach"
    )
    for name in ("", "x" * 201):
        with pytest.raises(RemoteProtocolError, match="a client id of"):
            messages.decode_description(messages.encode_description(name, {}))


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=4)))
@settings(deadline=None)
def test_arrays_of_any_flower_app_are_read(array):
    for one in (array, np.asfortranarray(array), array.T):
        back = messages.from_record(RecordDict({"m": ArrayRecord([one])}), "m")
        (read,) = back.values()
        assert np.array_equal(read, one, equal_nan=True)


def with_fact(**facts) -> RecordDict:
    content = messages.RequestEncoder("run", "{}", "app").encode(
        Exchange.TRAIN, Work(1, 1, ("a",), {}, {}, "d", {}, 1.0)
    )["a"]
    for key, value in facts.items():
        if value is None:
            del content[messages.RECORD][key]
        else:
            content[messages.RECORD][key] = value
    return content


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": 2}, "format 2, expected 1"),
        ({"format": None}, "format None"),
        ({"exchange": "steal"}, "unknown exchange 'steal'"),
        ({"exchange": 3}, "exchange is int, expected text"),
        ({"run": b"run"}, "run is bytes, expected text"),
        ({"study": None}, "study is NoneType"),
        ({"round": "1"}, "round is str, expected an integer"),
        ({"round": 1.0}, "round is float"),
        ({"attempt": True}, "attempt is bool"),
        ({"base_round": [1]}, "base_round is list"),
        ({"model_digest": 7}, "model_digest is int"),
    ],
)
def test_requests_with_another_field_are_refused(facts, message):
    with pytest.raises(RemoteProtocolError, match=message):
        messages.decode_request(with_fact(**facts))


@pytest.mark.parametrize("record", [None, ConfigRecord({})])
def test_requests_without_a_model_are_refused(record):
    content = with_fact()
    del content["model"]
    if record is not None:
        content["model"] = record
    with pytest.raises(RemoteProtocolError, match="record 'model' is"):
        messages.decode_request(content)


@given(st.binary(max_size=120))
def test_any_bytes_of_an_array_are_read_or_refused(data):
    for head in (b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"PK\x03\x04", b"\x80\x04"):
        content = RecordDict({"m": ArrayRecord({"a": Array("float32", (1,), "numpy.ndarray", head + data)})})
        try:
            messages.from_record(content, "m")
        except RemoteProtocolError:
            continue


@given(st.binary(min_size=1, max_size=6), st.integers(0, 90))
@settings(deadline=None)
def test_damaged_arrays_are_read_or_refused(patch, place):
    out = BytesIO()
    np.save(out, np.arange(4, dtype=np.float32))
    data = out.getvalue()
    data = data[:place] + patch + data[place + len(patch) :]
    content = RecordDict({"m": ArrayRecord({"a": Array("float32", (4,), "numpy.ndarray", data)})})
    try:
        (array,) = messages.from_record(content, "m").values()
    except (RemoteProtocolError, LimitExceededError):
        return
    except Exception as error:
        assert "got dtype" in str(error), repr(error)  # noqa: PT017  # any other error is a defect
        return
    assert array.nbytes <= len(data)


def test_reading_an_array_copies_nothing():
    out = BytesIO()
    np.save(out, np.arange(1000, dtype=np.float32))
    data = out.getvalue()
    (array,) = messages.from_record(
        RecordDict({"m": ArrayRecord({"a": Array("float32", (1000,), "numpy.ndarray", data)})}), "m"
    ).values()
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.float64(3.5),
        np.zeros((0, 5), np.int64),
        np.array([True, False]),
        np.arange(6, dtype=">i4"),
        np.array(["one", "three"]),
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::2],
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_are_written_as_flower_writes_them(array):
    ours, theirs = messages.to_record({"a": array})["a"], Array(np.asarray(array))
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
