"""A message's array bytes on their way: cut once into frames by the sender, put together and checked by the receiver."""

from __future__ import annotations

import io
import secrets
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import xxhash

from fedlearn.errors import RemoteProtocolError
from fedlearn.link.frames import Chunk, Start
from fedlearn.link.framing import pack_chunk
from fedlearn.link.limits import MIB

_CACHED_FRAME_BYTES: Final = 4 * MIB


class Payload:
    """The buffers of one message or of many messages with the same arrays, as one run of bytes cut into chunks.

    A frame is built when the first stream needs it and shared by all others, so N clients cost one encoding. Frames
    are kept in a window of 4 MiB: streams that go abreast share them, a straggler has its frames cut again from the
    buffers (checksums are kept). Memory is therefore the buffers and the window, whatever the number of streams.

    Attributes:
        payload_id: random, 64 bits; names these bytes on every stream.
        size_bytes: bytes of all buffers.
        buffer_bytes: bytes of each buffer.
        frames_built: how many frames were built so far.
    """

    def __init__(self, buffers: Sequence[bytes], chunk_bytes: int) -> None:
        self.payload_id = secrets.randbits(64)
        self.buffer_bytes = tuple(len(buffer) for buffer in buffers)
        self.frames_built = 0
        self._views = [memoryview(buffer) for buffer in buffers if buffer]
        self._ends = list(accumulate(len(view) for view in self._views))
        self.size_bytes = self._ends[-1] if self._ends else 0
        self._chunk_bytes = chunk_bytes
        self._sums: dict[int, int] = {}
        self._frames: OrderedDict[int, bytes] = OrderedDict()
        self._window = max(2, _CACHED_FRAME_BYTES // chunk_bytes)

    def frame_at(self, offset: int) -> tuple[bytes, int]:
        """The frame of the chunk that begins at `offset`, and the offset after it."""
        index = offset // self._chunk_bytes
        frame = self._frames.get(index)
        if frame is None:
            frame = self._frames[index] = self._build(index)
            if len(self._frames) > self._window:
                self._frames.popitem(last=False)
        return frame, min(offset + self._chunk_bytes, self.size_bytes)

    def is_boundary(self, offset: int) -> bool:
        """True when a chunk begins, or the payload ends, at `offset`."""
        return offset == self.size_bytes or (offset < self.size_bytes and offset % self._chunk_bytes == 0)

    def forget(self, offset: int) -> None:
        """Build the chunk at `offset` anew, checksum and all: the receiver found it damaged."""
        index = offset // self._chunk_bytes
        self._frames.pop(index, None)
        self._sums.pop(index, None)

    def _build(self, index: int) -> bytes:
        begin = index * self._chunk_bytes
        parts = self._cut(begin, min(begin + self._chunk_bytes, self.size_bytes))
        checksum = self._sums.get(index)
        if checksum is None:
            hasher = xxhash.xxh3_64()
            for part in parts:
                hasher.update(part)
            checksum = self._sums[index] = hasher.intdigest()
        self.frames_built += 1
        return pack_chunk(self.payload_id, begin, checksum, parts)

    def _cut(self, begin: int, end: int) -> list[memoryview]:
        parts = []
        at = bisect_right(self._ends, begin)
        while begin < end:
            view, view_end = self._views[at], self._ends[at]
            start = begin - (view_end - len(view))
            stop = min(end, view_end)
            parts.append(view[start : start + stop - begin])
            begin = stop
            at += 1
        return parts


@dataclass
class Outgoing:
    """A message that waits here until the other end has acknowledged it (a reply) or answered it (an instruction).

    `deadline` is monotonic seconds here; `acked` is true while the receiver, in its present incarnation, holds it.
    """

    message_id: str
    reply_to: str
    metadata: bytes = field(repr=False)
    payload: Payload = field(repr=False)
    deadline: float
    acked: bool = False


@dataclass
class Sending:
    """One message on this connection: how far it was handed to the wire."""

    message: Outgoing
    offset: int = 0
    started: bool = False
    ended: bool = False
    retries: int = 0


class Incoming:
    """A message that is being received: chunks in order, each checked before its data is kept.

    Nothing is allocated for bytes that were announced and have not come. The finished buffers are the very bytes
    objects that were written into.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.size_bytes = sum(start.buffer_bytes)
        self.received_bytes = 0
        self.failures = 0
        self.rewinding = False
        self.ttl_s = start.ttl_s
        self._sizes = start.buffer_bytes
        self._done: list[bytes] = []
        self._open = io.BytesIO()
        self._skip_empty()

    @property
    def complete(self) -> bool:
        """True when every announced byte is here."""
        return self.received_bytes == self.size_bytes

    def write(self, chunk: Chunk) -> bool:
        """Keep a chunk's data; False when it does not fit its checksum, in which case nothing was kept.

        Raises:
            RemoteProtocolError: the chunk is empty, not the next one, or longer than what was announced.
        """
        size = len(chunk.data)
        if chunk.offset != self.received_bytes:
            raise RemoteProtocolError(
                f"chunk: got offset {chunk.offset} of message {self.start.message_id}, expected {self.received_bytes}"
            )
        if size == 0 or chunk.offset + size > self.size_bytes:
            raise RemoteProtocolError(
                f"chunk: got {size} bytes at {chunk.offset} of message {self.start.message_id}, which has {self.size_bytes}"
            )
        if xxhash.xxh3_64_intdigest(chunk.data) != chunk.checksum:
            return False
        self._keep(memoryview(chunk.data))
        self.received_bytes += size
        return True

    def buffers(self) -> tuple[bytes, ...]:
        """The finished buffers. Only when complete; empties this object."""
        done, self._done = self._done, []
        return tuple(done)

    def _keep(self, data: memoryview) -> None:
        while data:
            missing = self._sizes[len(self._done)] - self._open.tell()
            part, data = data[:missing], data[missing:]
            if len(part) < missing:
                self._open.write(part)
                return
            if self._open.tell() == 0:
                self._done.append(bytes(part))
            else:
                self._open.write(part)
                # getvalue of a BytesIO that is exactly full hands out its own bytes object: no copy.
                self._done.append(self._open.getvalue())
                self._open = io.BytesIO()
            self._skip_empty()

    def _skip_empty(self) -> None:
        while len(self._done) < len(self._sizes) and self._sizes[len(self._done)] == 0:
            self._done.append(b"")
