"""What stateful strategies' clients remember between rounds, for any number of clients: in a journal, or in memory up to a limit.

A client's memory stands in two slots: one holds the state of its base, whose update entered a committed sum; the other one takes
the candidate of the attempt under way. Nothing that the run's records count on is ever overwritten, so a crash at any moment
leaves bases and memories that fit each other. It is `fedlearn.learning.memory`'s rule for one client at a site.
"""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedlearn import arrays as named
from fedlearn.errors import StateError
from fedlearn.learning.memory import missing_base
from fedlearn.release.journal import pack, unpack
from fedlearn.release.keys import AttemptId, record_key
from fedlearn.release.sqlite import SqliteJournal

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Base
    from fedlearn.release.journal import Journal

MEMORY_BYTES: Final = 64 * 1024**2
"""Of states that are kept in memory: a cache where there is a journal, all that there is where there is none."""

_Slot = tuple[str, int]


class ClientStates:
    """`Memories` that outlive the process, or need not fit in it. States that are handed out are not to be changed.

    Args:
        journal: the run's own, so that memories and rounds are committed together. None keeps the memories in this process, and
            those beyond `memory_bytes` in a temporary folder.
        memory_bytes: of states in memory.
    """

    def __init__(self, journal: Journal | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._journal, self._memory_bytes = journal, memory_bytes
        self._overflow: _Overflow | None = None
        self._slots: dict[str, list[Base | None]] = {}
        self._bases: dict[str, Base | None] = {}
        self._near: OrderedDict[_Slot, Arrays] = OrderedDict()
        self._near_bytes = 0
        self._mutex = threading.Lock()

    def at(self, client: str, base: Base | None) -> Arrays:
        state = self.peek(client, base)
        self._bases[client] = base
        return state

    def peek(self, client: str, base: Base | None) -> Arrays:
        if base is None:
            return {}
        with self._mutex:
            slots = self._slots_of(client)
            if base not in slots:
                raise missing_base(base, slots[0] or slots[1])
            slot = client, slots.index(base)
            if slot not in self._near:
                self._hold(slot, self._fetch(slot))
            self._near.move_to_end(slot)
            return self._near[slot]

    def keep(self, client: str, made: Base, state: Arrays) -> None:
        with self._mutex:
            base, slots = self._bases.get(client), list(self._slots_of(client))
            slot = client, 1 if base is not None and slots[0] == base else 0
            slots[slot[1]] = made[0], made[1]
            if self._journal is not None:
                index = {_index_key(client): pack({"slots": slots})}
                self._journal.write({**index, _value_key(slot): named.to_bytes(state)})
            self._slots[client] = slots
            self._hold(slot, state)

    def close(self) -> None:
        """Free memory and the temporary folder; the journal is its owner's to close."""
        with self._mutex:
            self._near.clear()
            self._near_bytes = 0
            self._slots.clear()
            self._bases.clear()
            if self._overflow is not None:
                self._overflow.close()
                self._overflow = None

    def _slots_of(self, client: str) -> list[Base | None]:
        if client not in self._slots:
            data = None if self._journal is None else self._journal.get(_index_key(client))
            what = f"memory of client {client!r}"
            pairs = [None, None] if data is None else unpack(data, "slots", what=what)["slots"]
            self._slots[client] = [p if p is None else AttemptId.from_pair(p, what=what) for p in pairs]
        return self._slots[client]

    def _fetch(self, slot: _Slot) -> Arrays:
        source = self._journal if self._journal is not None else self._overflow
        data = None if source is None else source.get(_value_key(slot))
        if data is None:
            raise StateError(f"client memory: the state of {slot[0]!r} is missing", hint="restore the run folder")
        return named.from_bytes(data)

    def _hold(self, slot: _Slot, state: Arrays) -> None:
        """Keep a state near; those that were not used for longest make room."""
        if slot in self._near:
            self._near_bytes -= named.size_bytes(self._near.pop(slot))
        self._near[slot] = state
        self._near_bytes += named.size_bytes(state)
        while self._near_bytes > self._memory_bytes and len(self._near) > 1:
            gone, old = self._near.popitem(last=False)
            self._near_bytes -= named.size_bytes(old)
            if self._journal is None:
                self._overflow = self._overflow or _Overflow()
                self._overflow.write({_value_key(gone): named.to_bytes(old)})


class _Overflow(SqliteJournal):
    """A journal in a temporary folder, gone when it is closed."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="fedlearn-states-")
        super().__init__(Path(self._temporary.name), durable=False)

    def close(self) -> None:
        super().close()
        self._temporary.cleanup()


def _index_key(client: str) -> str:
    return record_key("memory", client)


def _value_key(slot: _Slot) -> str:
    return record_key("memory", *slot)
