"""What a round's messages weigh on our link: the request and the update of each client, in bytes, without making either.

A message is a start frame (with all that is not array data), chunk frames, an end frame, and an acknowledgement the other way. The metadata is
encoded for real, once for each size that its numbers can have; array bytes and chunks are counted. What gRPC, HTTP/2 and
TLS add is left out, some 40 bytes in 16 KiB; so are heartbeats.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, Message, MessageType, RecordDict

from fedlearn.arrays import Spec, specs_of
from fedlearn.learning import messages
from fedlearn.learning.backend import Base, Exchange, Work
from fedlearn.learning.update import Update
from fedlearn.link import flower, framing
from fedlearn.link.frames import Ack, End, Start
from fedlearn.link.limits import LinkLimits

if TYPE_CHECKING:
    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.strategy import Strategy
    from fedlearn.study import Study

RUN: Final = "0" * 16
APP: Final = "0" * 64
"""As long as a coordinator's run ids and an app's digest are."""
RUN_NUMBER: Final = 2**62
PAYLOAD: Final = 2**63
FACTS: Final = {"loss": 1.0, "steps": 1.0}
"""What every client says of its training without a privacy plan, in names; numbers have one size."""

Specs = Mapping[str, Spec]


@dataclass(frozen=True)
class Traffic:
    """Sizes of one study's messages.

    Args:
        study: its canonical JSON travels in every request.
        strategy: what it releases travels back.
        model: names, shapes and dtypes of the weights.
        shared: of what is broadcast beside them.
        chunk_bytes: see `LinkLimits`.
    """

    study: Study
    strategy: Strategy
    model: Specs
    shared: Specs
    chunk_bytes: int = field(default_factory=lambda: LinkLimits().chunk_bytes)

    @classmethod
    def of(cls, study: Study, strategy: Strategy, work: Work) -> Traffic:
        """For messages like these."""
        return cls(study, strategy, specs_of(work.model), specs_of(work.shared))

    def down(self, work: Work, clients: Sequence[str]) -> IntArray:
        """Bytes to each client: its request, and the acknowledgement of its update."""
        at = replace(work, cohort=(), model={}, shared={}, base={})
        weigh = cache(lambda node, base: self._request(at, node, base))
        sizes = [weigh(_number_like(flower.node_id_of(client)), work.base.get(client)) for client in clients]
        return np.array(sizes, dtype=np.int64)

    def up(self, work: Work, clients: Sequence[str], examples: IntArray) -> IntArray:
        """Bytes from each client, which has so many examples: its update, and the acknowledgement of its request."""
        if self.study.privacy is not None:  # an update says nothing of them
            examples = np.ones_like(examples)
        weigh = cache(lambda node, count: self._update(work.round, node, count))
        sizes = [
            weigh(_number_like(flower.node_id_of(client)), _number_like(count, signed=True))
            for client, count in zip(clients, examples.tolist(), strict=True)
        ]
        return np.array(sizes, dtype=np.int64)

    def _request(self, work: Work, node: int, base: Base | None) -> int:
        named = replace(work, cohort=("",), base={} if base is None else {"": base})
        encoder = messages.RequestEncoder(RUN, self.study.to_json(), APP)
        content = encoder.encode(Exchange.TRAIN, named)[""]
        content["model"], content["shared"] = _hollow(self.model), _hollow(self.shared)
        message = _message(content, node, work.round)
        return self._frames(message, (self.model, self.shared), "") + _ack()

    def _update(self, round_number: int, node: int, examples: int) -> int:
        facts = FACTS if self.study.privacy is None else {}
        content = messages.encode_update(Update({}, examples=examples, facts=facts))
        for release in self.strategy.releases:
            content[messages.PRIVATE + release.name] = _hollow(self.model)
        request = _message(RecordDict(), node, round_number)
        reply = Message(content, reply_to=request)
        return self._frames(reply, (self.model,) * len(self.strategy.releases), flower.new_message_id()) + _ack()

    def _frames(self, message: Message, groups: Sequence[Specs], reply_to: str) -> int:
        """All frames of one message."""
        metadata = flower.encode(message).metadata
        buffers = tuple(_npy_bytes(spec) for specs in groups for spec in specs.values())
        start = Start(flower.new_message_id(), reply_to, PAYLOAD, metadata, buffers, self.study.runtime.deadline_s)
        whole, rest = divmod(sum(buffers), self.chunk_bytes)
        chunks = whole * _chunk_frame(self.chunk_bytes) + (_chunk_frame(rest) if rest else 0)
        return len(framing.pack(start)) + chunks + len(framing.pack(End(PAYLOAD)))


def _message(content: RecordDict, node: int, round_number: int) -> Message:
    flower.ensure_identity(RUN_NUMBER)
    message = Message(content, node, MessageType.TRAIN, ttl=1.0, group_id=str(round_number))
    flower.stamp(
        message,
        message_id=flower.new_message_id(),
        run_id=RUN_NUMBER,
        src_node_id=flower.SERVER_NODE_ID,
        reply_to_message_id="",
    )
    return message


def _hollow(specs: Specs) -> ArrayRecord:
    """Arrays without their data, which is not part of the metadata."""
    return ArrayRecord(
        {
            name: FlowerArray(dtype=str(spec.dtype), shape=tuple(spec.shape), stype="numpy.ndarray", data=b"")
            for name, spec in specs.items()
        }
    )


def _npy_bytes(spec: Spec) -> int:
    """The size of an array in numpy's own format."""
    out = io.BytesIO()
    dtype = np.dtype(spec.dtype)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(spec.shape)}
    np.lib.format.write_array_header_1_0(out, header)
    return len(out.getvalue()) + int(np.prod(spec.shape, dtype=np.int64)) * dtype.itemsize


@cache
def _chunk_frame(size: int) -> int:
    return len(framing.pack_chunk(PAYLOAD, 0, 0, (bytes(size),)))


@cache
def _ack() -> int:
    return len(framing.pack(Ack(flower.new_message_id())))


def _number_like(value: int, *, signed: bool = False) -> int:
    """The smallest positive number that takes as many bytes on the wire: seven bits a byte, one of them all for a sign."""
    return max(1, (1 << (value.bit_length() + signed - 1) // 7 * 7) >> signed)
