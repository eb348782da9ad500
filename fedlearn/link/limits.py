"""Every size, count and wait that the other end could push, by name. No buffer on the link grows past one of these."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True)
class LinkLimits:
    """Named limits of one link. Both ends should run with the same ones; each enforces its own.

    Attributes:
        frame_bytes: one frame, and so one gRPC message.
        chunk_bytes: data in one chunk that this end sends.
        window_bytes: flow control: what a peer may have under way on one stream; divided by the round-trip time it is the
            most a stream can carry, 40 MB/s at 50 ms.
        message_bytes: array data of one message.
        metadata_bytes: a message without its array data.
        message_buffers: arrays in one message.
        incoming_messages: messages that the other end has begun and not finished.
        incoming_bytes: announced bytes of all unfinished incoming messages together.
        outgoing_messages: messages waiting here for one peer.
        outgoing_bytes: array data waiting here for one peer.
        unanswered_messages: instructions that one client may hold without having answered them.
        running_handlers: instructions that a client works on at the same time.
        checksum_retries: times that chunks of one message may fail their checksum before the peer is given up.
        id_bytes: a message id.
        facts: facts that a client may state, and `fact_bytes` the size of one key or value.
        reason_bytes: text in a goodbye or fault.
        clients: distinct clients that one server remembers.
        connections: streams and calls that one server serves at the same time.
        heartbeat_s: silence after which an end says that it lives.
        heartbeat_grace_s: added to the promised heartbeat before the other end is taken for dead.
        heartbeat_promise_s: the longest silence that a peer may promise.
        handshake_s: from the open stream to Hello or Welcome.
        reconnect_s: how long a lost client's messages wait for it; never longer than their own deadline.
        backoff_min_s: first wait before a client dials again; doubles, with jitter, up to `backoff_max_s`.
        stop_s: time that a stopping end gives the other to read its goodbye.
        study_bytes: text of a submitted study, and `model_bytes` the size of a fetched model.
        event_bytes: one watched event.
    """

    frame_bytes: int = 18 * MIB
    chunk_bytes: int = 512 * KIB
    window_bytes: int = 2 * MIB
    message_bytes: int = 2 * GIB
    metadata_bytes: int = 16 * MIB
    message_buffers: int = 100_000
    incoming_messages: int = 64
    incoming_bytes: int = 8 * GIB
    outgoing_messages: int = 1_024
    outgoing_bytes: int = 16 * GIB
    unanswered_messages: int = 256
    running_handlers: int = 4
    checksum_retries: int = 3
    id_bytes: int = 128
    facts: int = 64
    fact_bytes: int = 1 * KIB
    reason_bytes: int = 4 * KIB
    clients: int = 100_000
    connections: int = 10_000
    heartbeat_s: float = 5.0
    heartbeat_grace_s: float = 10.0
    heartbeat_promise_s: float = 60.0
    handshake_s: float = 10.0
    reconnect_s: float = 300.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 10.0
    stop_s: float = 2.0
    study_bytes: int = 1 * MIB
    model_bytes: int = 16 * GIB
    event_bytes: int = 1 * MIB

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "checksum_retries"):
                raise ValueError(f"limit {name}: got {value}, expected a positive number")
        if self.frame_bytes < max(self.chunk_bytes, self.metadata_bytes) + MIB:
            raise ValueError("limit frame_bytes: must exceed chunk_bytes and metadata_bytes by at least 1 MiB")
