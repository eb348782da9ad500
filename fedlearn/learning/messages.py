"""Client work as Flower messages: the same records over our link and on stock Flower.

A message holds one ConfigRecord `fedlearn` (what is asked, as plain values), and ArrayRecords `model` and `shared`. A reply holds the same
ConfigRecord with the client's facts, and one ArrayRecord `private.NAME` for each release. Nothing is pickled; arrays are
numpy's own format and are read with `allow_pickle=False`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from fedlearn.arrays import LIMITS, Arrays, check_limits
from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.learning.backend import Base, Exchange, Said, Scored, Work
from fedlearn.learning.collect import MAX_EXAMPLES
from fedlearn.learning.update import Update

if TYPE_CHECKING:
    from fedlearn import arrays as named

RECORD: Final = "fedlearn"
PRIVATE: Final = "private."
MASKED: Final = "masked"
KEYED: Final = frozenset({Exchange.CHECK_IN, Exchange.REVEAL, Exchange.SHARE, Exchange.AGREE, Exchange.UNMASK})
"""Exchanges of secure aggregation that an agent answers itself. Their messages hold no model, but for SHARE's where it rides ahead of TRAIN's."""
MODEL: Final = "model"
MESSAGE_TYPES: Final = {
    Exchange.DESCRIBE: MessageType.QUERY,
    Exchange.TRAIN: MessageType.TRAIN,
    Exchange.EVALUATE: MessageType.EVALUATE,
    Exchange.CHECK_IN: f"{MessageType.QUERY}.check_in",
    Exchange.REVEAL: f"{MessageType.QUERY}.reveal",
    Exchange.SHARE: f"{MessageType.QUERY}.share",
    Exchange.AGREE: f"{MessageType.QUERY}.agree",
    Exchange.UNMASK: f"{MessageType.QUERY}.unmask",
    Exchange.CLOSE: f"{MessageType.QUERY}.close",
}
"""Flower's name of what a message asks, by which an app chooses the function that answers: one for each exchange."""
FORMAT: Final = 1

MAX_METRICS: Final = 1_000
MAX_CELLS: Final = 10_000
"""Noisy sums of one evaluation."""
"""The most metrics or facts of one client; each enters the history."""
MAX_NAME_BYTES: Final = 200
"""The longest name of a metric or of a client."""
NPY_HEADER_BYTES: Final = 1_024
"""The longest header of an array in numpy's format: eight dimensions need a quarter of it."""

_NPY_START: Final = b"\x93NUMPY\x01\x00"
_NPY_HEADER: Final = re.compile(
    rb"\{'descr': '([<>|][a-zA-Z]\d{1,4})', 'fortran_order': (True|False), 'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\), \} *\n"
)


@dataclass(frozen=True)
class Request:
    """What a message asks of a client.

    Args:
        run: the run's name.
        exchange: what is asked.
        study: the study as canonical JSON: the run's manifest.
        app: digest of the app that the server runs.
        round: see `Work`.
        attempt: see `Work`.
        model_digest: see `Work`; "" when the message carries no model.
        base: see `Work`; None when the client never entered a sum.
        body: what a client is told in secure aggregation, or of the run's end.
        length: coordinates of an update, in secure aggregation; 0 elsewhere.
        model: global weights.
        shared: broadcast beside them.
    """

    run: str
    exchange: Exchange
    study: str
    app: str
    round: int = 0
    attempt: int = 0
    model_digest: str = ""
    base: Base | None = None
    body: bytes = field(default=b"", repr=False)
    length: int = 0
    model: Arrays = field(default_factory=dict, repr=False)
    shared: Arrays = field(default_factory=dict, repr=False)


class RequestEncoder:
    """Encodes a cohort's requests; arrays are encoded once and shared by all of them.

    Args:
        run: see `Request`.
        study: see `Request`.
        app: see `Request`.
        model_with_shares: whether a masked round's model rides on SHARE, and its TRAIN brings none: our own agents train while shares are
            exchanged. A Flower node does one thing at a time.
    """

    def __init__(self, run: str, study: str, app: str, *, model_with_shares: bool = False) -> None:
        self.run: Final = run
        self._study, self._app = study, app
        self._model_with_shares = model_with_shares

    def describe(self) -> RecordDict:
        """The request that asks a client who it is."""
        return RecordDict({RECORD: ConfigRecord(self._facts(Exchange.DESCRIBE))})

    def close(self, word: bytes) -> RecordDict:
        """The message that a run is over; see `fedlearn.link.closing`."""
        return RecordDict({RECORD: ConfigRecord(self._facts(Exchange.CLOSE) | {"body": word})})

    def encode(
        self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes] | None = None, length: int = 0
    ) -> Mapping[str, RecordDict]:
        """One request a client of the cohort, by client id; with `bodies` and `length` one of secure aggregation."""
        arrays = {}
        if self._brings_model(exchange, masked=bodies is not None):
            arrays = {MODEL: to_record(work.model), "shared": to_record(work.shared)}
        requests = {}
        for client in work.cohort:
            base = work.base.get(client)
            facts = self._facts(exchange) | {
                "round": work.round,
                "attempt": work.attempt,
                "model_digest": work.model_digest,
                "base_round": base[0] if base else 0,
                "base_attempt": base[1] if base else 0,
            }
            if bodies is not None:
                facts |= {"body": bodies[client], "length": length}
            requests[client] = RecordDict({RECORD: ConfigRecord(facts), **arrays})
        return requests

    def _brings_model(self, exchange: Exchange, *, masked: bool) -> bool:
        if masked and self._model_with_shares:
            return exchange is Exchange.SHARE
        return exchange not in KEYED

    def _facts(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "run": self.run,
            "exchange": exchange.value,
            "study": self._study,
            "app": self._app,
        }


def decode_request(content: RecordDict) -> Request:
    """A request from a message's content.

    Raises:
        RemoteProtocolError: a record or a field is missing or of another type.
    """
    request = decode_facts(content)
    if request.exchange in {Exchange.DESCRIBE, Exchange.CLOSE, *KEYED}:
        return request
    return replace(request, model=from_record(content, MODEL), shared=from_record(content, "shared"))


def decode_facts(content: RecordDict) -> Request:
    """A request without its arrays: all that an agent needs to admit and to name it. Raises as `decode_request`."""
    facts = _facts_of(content)
    try:
        exchange = Exchange(_text(facts, "exchange"))
    except ValueError:
        raise RemoteProtocolError(f"message: unknown exchange {facts.get('exchange')!r}") from None
    run, study, app = _text(facts, "run"), _text(facts, "study"), _text(facts, "app")
    if exchange is Exchange.DESCRIBE:
        return Request(run, exchange, study, app)
    if exchange is Exchange.CLOSE:
        return Request(run, exchange, study, app, body=_bytes(facts, "body"))
    base_round = _number(facts, "base_round")
    return Request(
        run,
        exchange,
        study,
        app,
        round=_number(facts, "round"),
        attempt=_number(facts, "attempt"),
        model_digest=_text(facts, "model_digest"),
        base=(base_round, _number(facts, "base_attempt")) if base_round else None,
        body=_bytes(facts, "body") if "body" in facts else b"",
        length=_number(facts, "length") if "length" in facts else 0,
    )


def brings_model(content: RecordDict) -> bool:
    """Whether a request has arrays to train on."""
    return MODEL in content


def as_training(content: RecordDict) -> RecordDict:
    """A SHARE that brought the model as the TRAIN that an app answers: the same work, without what it said to the agent."""
    facts = {**_facts_of(content), "exchange": Exchange.TRAIN.value, "body": b""}
    return RecordDict({**content, RECORD: ConfigRecord(facts)})


def check_type(exchange: Exchange, message_type: str) -> None:
    """A message is answered by what its type names, and admitted by what it says that it asks: both must be the same.

    Raises:
        RemoteProtocolError: they are not.
    """
    if message_type != MESSAGE_TYPES[exchange]:
        raise RemoteProtocolError(
            f"message: it asks for {exchange.value} and has the type {message_type!r}, expected {MESSAGE_TYPES[exchange]!r}"
        )


def encode_description(client: str, facts: Mapping[str, str | int | float]) -> RecordDict:
    """A client's answer to `describe`."""
    return RecordDict({RECORD: ConfigRecord({"format": FORMAT, "client": client, **facts})})


def decode_description(content: RecordDict) -> str:
    """The study client id that a client answered with."""
    client = _text(_facts_of(content), "client")
    if not 1 <= len(client.encode(errors="replace")) <= MAX_NAME_BYTES:
        raise RemoteProtocolError(f"message: a client id of {len(client)} characters, limit is {MAX_NAME_BYTES} bytes")
    return client


def encode_update(update: Update) -> RecordDict:
    """A client's update as a reply's content."""
    content = RecordDict({RECORD: ConfigRecord({"format": FORMAT, "examples": update.examples})})
    content["facts"] = MetricRecord({name: float(value) for name, value in update.facts.items()})
    for name, arrays in update.private.items():
        content[PRIVATE + name] = to_record(arrays)
    return content


def decode_update(content: RecordDict) -> Update:
    """A client's update from a reply's content. Shapes and values are the collector's to check."""
    facts = _facts_of(content)
    private = {key.removeprefix(PRIVATE): from_record(content, key) for key in content if key.startswith(PRIVATE)}
    return Update(private, examples=_number(facts, "examples"), facts=_metrics(content, "facts"))


def encode_said(body: bytes, entry: bytes = b"") -> RecordDict:
    """A client's answer in secure aggregation as a reply's content."""
    content = RecordDict({RECORD: ConfigRecord({"format": FORMAT, "entry": entry})})
    # Among the arrays it is not copied through protobuf; a masked vector is as long as a model.
    content[MASKED] = to_record({"body": np.frombuffer(body, dtype=np.uint8)})
    return content


def with_entry(content: RecordDict, entry: bytes) -> RecordDict:
    """The same answer with a check-in for the next round: it rides along, and is no part of what was released."""
    return RecordDict({**content, RECORD: ConfigRecord({**content.config_records[RECORD], "entry": entry})})


def with_last(content: RecordDict) -> RecordDict:
    """The same answer to TRAIN with the mark that no other update of the run will come from there; no part of what was released."""
    return RecordDict({**content, RECORD: ConfigRecord({**content.config_records[RECORD], "last": True})})


def is_last(content: RecordDict) -> bool:
    """Whether an answer to TRAIN has that mark."""
    record = content.get(RECORD)
    return isinstance(record, ConfigRecord) and record.get("last") is True


def decode_said(client: str, content: RecordDict) -> Said:
    """A client's answer in secure aggregation from a reply's content. What it says is the protocol's to check."""
    body = from_record(content, MASKED).get("body")
    if body is None or body.dtype != np.uint8 or body.ndim != 1:
        raise RemoteProtocolError(f"message: record {MASKED!r} holds no bytes")
    return Said(client, body.tobytes(), _bytes(_facts_of(content), "entry"))


def encode_scores(metrics: Mapping[str, float], examples: int, cells: Sequence[float] = ()) -> RecordDict:
    """A client's metrics, or its noisy sums, as a reply's content."""
    content = RecordDict({RECORD: ConfigRecord({"format": FORMAT, "examples": examples})})
    content["metrics"] = MetricRecord({name: float(value) for name, value in metrics.items()})
    if len(cells):
        content["cells"] = to_record({"cells": np.asarray(cells, dtype=np.float64)})
    return content


def decode_scores(client: str, content: RecordDict) -> Scored:
    """A client's metrics from a reply's content."""
    examples = _number(_facts_of(content), "examples")
    if not 0 <= examples <= MAX_EXAMPLES:
        raise RemoteProtocolError(f"message: {examples} test examples, expected 0 to {MAX_EXAMPLES}")
    cells = from_record(content, "cells").get("cells", np.zeros(0)) if "cells" in content else np.zeros(0)
    if cells.ndim != 1 or cells.dtype != np.float64 or len(cells) > MAX_CELLS:
        raise RemoteProtocolError(
            f"message: sums {cells.dtype}{list(cells.shape)}, expected float64, at most {MAX_CELLS} numbers"
        )
    return Scored(client, _metrics(content, "metrics"), examples, tuple(cells.tolist()))


def to_record(arrays: Arrays) -> ArrayRecord:
    """Named arrays as Flower's record; readable by any Flower app."""
    return ArrayRecord({name: _as_flowers(np.asarray(array)) for name, array in arrays.items()})


def _as_flowers(array: named.Array) -> FlowerArray:
    """`FlowerArray(array)`, with one copy: Flower's own grows a buffer, which takes twenty times as long for a model of some megabytes."""
    if not array.flags.c_contiguous or array.dtype.hasobject:
        return FlowerArray(array)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
    data = b"".join((head.getvalue(), array.reshape(-1).view(np.uint8).data))
    return FlowerArray(str(array.dtype), array.shape, "numpy.ndarray", data)


def from_record(content: RecordDict, key: str) -> dict[str, named.Array]:
    """Named arrays from a record, refusing what exceeds a limit or is not a plain numpy array."""
    record = content.get(key)
    if not isinstance(record, ArrayRecord):
        raise RemoteProtocolError(f"message: record {key!r} is {type(record).__name__}, expected arrays")
    if len(record) > LIMITS.tensors:
        raise LimitExceededError(f"message: {len(record)} tensors, limit tensors is {LIMITS.tensors}")
    arrays: dict[str, named.Array] = {}
    for name, array in record.items():
        if array.stype != "numpy.ndarray":
            raise RemoteProtocolError(f"message: array {name!r} has format {array.stype!r}, expected numpy.ndarray")
        arrays[name] = _read_array(name, array.data)
    check_limits(arrays)
    return arrays


def _read_array(name: str, data: bytes) -> named.Array:
    """An array from numpy's own format (.npy), a read-only view of `data`.

    Not numpy's reader: `numpy.load` opens archives too and allocates whatever a header claims, and headers go through
    Python's tokenizer, which fails in its own ways. This takes the one form of header that numpy writes.
    """
    start = len(_NPY_START) + 2
    end = start + int.from_bytes(data[len(_NPY_START) : start], "little")
    head = bytes(data[: min(end, NPY_HEADER_BYTES)])
    match = _NPY_HEADER.fullmatch(head, start) if head.startswith(_NPY_START) else None
    if match is None:
        raise RemoteProtocolError(f"message: array {name!r} cannot be read: not in numpy's format")
    try:
        dtype = np.dtype(match[1].decode())
        shape = tuple(int(size) for size in match[3].replace(b" ", b"").split(b",") if size)
        flat: named.Array = np.frombuffer(data, dtype=dtype, offset=end)
    except (ValueError, TypeError) as error:
        raise RemoteProtocolError(f"message: array {name!r} cannot be read: {error}") from None
    if math.prod(shape) != flat.size or len(shape) > LIMITS.dimensions:
        raise RemoteProtocolError(f"message: array {name!r} cannot be read: {flat.size} values for shape {list(shape)}")
    return flat.reshape(shape, order="F" if match[2] == b"True" else "C")


def _facts_of(content: RecordDict) -> Mapping[str, Any]:
    record = content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise RemoteProtocolError(f"message: no record {RECORD!r}; expected one of fedlearn's messages")
    if record.get("format") != FORMAT:
        raise RemoteProtocolError(
            f"message: format {record.get('format')!r}, expected {FORMAT}",
            hint="install the same fedlearn on both sides",
        )
    return record


def _text(facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key)
    if not isinstance(value, str):
        raise RemoteProtocolError(f"message: {key} is {type(value).__name__}, expected text")
    return value


def _bytes(facts: Mapping[str, Any], key: str) -> bytes:
    value = facts.get(key)
    if not isinstance(value, bytes):
        raise RemoteProtocolError(f"message: {key} is {type(value).__name__}, expected bytes")
    return value


def _number(facts: Mapping[str, Any], key: str) -> int:
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RemoteProtocolError(f"message: {key} is {type(value).__name__}, expected an integer")
    return value


def _metrics(content: RecordDict, key: str) -> dict[str, float]:
    record = content.get(key)
    if not isinstance(record, MetricRecord):
        raise RemoteProtocolError(f"message: record {key!r} is {type(record).__name__}, expected metrics")
    if len(record) > MAX_METRICS or any(len(name.encode(errors="replace")) > MAX_NAME_BYTES for name in record):
        raise LimitExceededError(
            f"message: {len(record)} metrics, limits are {MAX_METRICS} metrics with names of {MAX_NAME_BYTES} bytes"
        )
    try:
        return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    except OverflowError:
        raise RemoteProtocolError(f"message: record {key!r} holds an integer that is no float") from None
