"""The journal in memory on a disk that forgets; what every journal promises is in tests/contract."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedlearn.release import MemoryDisk, MemoryJournal
from fedlearn.release.journal import Changes, replay

CHANGES = st.dictionaries(st.sampled_from("abcd"), st.none() | st.binary(max_size=9), max_size=4)


class CrashError(Exception):
    pass


class FailingDisk(MemoryDisk):
    """Fails at one operation, counted over the disk's life."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.left = fail_at

    def step(self, operation: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise CrashError(operation)


@given(st.lists(CHANGES, max_size=6), st.integers(1, 20), st.floats(0, 1))
def test_a_crash_leaves_whole_transactions_and_every_one_that_returned(
    transactions: list[Changes], fail_at: int, kept: float
) -> None:
    disk = FailingDisk(fail_at)
    journal = MemoryJournal(disk)
    before: dict[str, bytes] = {}
    after: dict[str, bytes] = {}
    for changes in transactions:
        after = {k: v for k, v in {**before, **changes}.items() if v is not None}
        try:
            journal.write(changes)
        except CrashError:
            break
        before = after
    disk.left = 0
    disk.crash(int(kept * disk.unsynced()))
    assert dict(MemoryJournal(disk).scan("")) in (before, after)
    # The torn end is gone: what is written next can be read.
    MemoryJournal(disk).write({"next": b"1"})
    assert MemoryJournal(disk).get("next") == b"1"


def test_bytes_that_were_not_synced_are_seen_by_the_living_only() -> None:
    disk = MemoryDisk()
    disk.append(b"written")
    assert (disk.read(), disk.durable(), disk.unsynced()) == (b"written", b"", 7)
    disk.sync()
    assert (disk.durable(), disk.unsynced()) == (b"written", 0)


@given(st.lists(CHANGES, min_size=1, max_size=4), st.data())
def test_a_changed_byte_ends_what_is_read(transactions: list[Changes], data: st.DataObject) -> None:
    disk = MemoryDisk()
    states = [{}]
    for changes in transactions:
        MemoryJournal(disk).write(changes)
        states.append(dict(MemoryJournal(disk).scan("")))
    content = bytearray(disk.durable())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    records, size = replay(bytes(content))
    assert size < len(content)
    assert records in states
