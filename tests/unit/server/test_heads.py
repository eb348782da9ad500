"""What a coordinator remembers of its sites' ledgers, and how it travels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Message, RecordDict

from fedlearn.clock import MockClock
from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.heads import LEDGER, MAX_HEAD_BYTES, MAX_HEADS, put_heads, take_heads
from fedlearn.link import flower
from fedlearn.privacy.chain import SignedHead, sign
from server.heads import StoredHeads
from server.rounds import GridBackend
from server.store import Store

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def head(seq: int, site: str = "cleveland", data_set: str = "heart", sha: str = "a" * 64) -> str:
    unsigned = SignedHead(site, data_set, seq, sha, b"")
    return replace(unsigned, signature=sign(KEY, unsigned.message())).to_text()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url, clock=MockClock(50.0))
    yield opened
    opened.close()


def test_the_latest_head_of_each_data_set_is_kept(store: Store) -> None:
    heads = StoredHeads(store)
    assert heads.remembered("cleveland") == ()
    for text in (head(3), head(7), head(5), head(2, data_set="blood")):
        heads.remember("cleveland", text)
    assert StoredHeads(store).remembered("cleveland") == (head(2, data_set="blood"), head(7))
    assert heads.remembered("hungary") == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        head(3, site="hungary"),
        head(-1),
        head(10**30),
        head(3, data_set="x" * 201),
        head(3, data_set="\ud800"),
        head(3, data_set=""),
    ],
)
def test_what_is_no_head_of_that_client_is_ignored(store: Store, text: str) -> None:
    heads = StoredHeads(store)
    heads.remember("cleveland", text)
    assert heads.remembered("cleveland") == ()


def test_a_client_cannot_fill_the_database(store: Store) -> None:
    heads = StoredHeads(store)
    for number in range(MAX_HEADS + 3):
        heads.remember("cleveland", head(1, data_set=f"d{number}"))
    assert len(heads.remembered("cleveland")) == MAX_HEADS
    heads.remember("cleveland", head(9, data_set="d0"))
    assert head(9, data_set="d0") in heads.remembered("cleveland")


def test_heads_come_out_of_a_message_as_they_went_in() -> None:
    content = RecordDict()
    put_heads(content, [])
    assert not content
    assert take_heads(content) == ()
    put_heads(content, [head(1), head(2)])
    assert take_heads(content) == (head(1), head(2))
    assert not content


@pytest.mark.parametrize(
    ("record", "error"),
    [
        (ConfigRecord({"heads": "one"}), RemoteProtocolError),
        (ConfigRecord({"heads": [1, 2]}), RemoteProtocolError),
        (ConfigRecord({}), RemoteProtocolError),
        (ConfigRecord({"heads": ["x" * (MAX_HEAD_BYTES + 1)]}), LimitExceededError),
        (ConfigRecord({"heads": ["x"] * (MAX_HEADS + 1)}), LimitExceededError),
    ],
)
def test_heads_that_are_none_are_refused(record: ConfigRecord, error: type[Exception]) -> None:
    with pytest.raises(error):
        take_heads(RecordDict({LEDGER: record}))


class Grid:
    """One client, which says who it is and how far its ledger has come."""

    def __init__(self, shown: str) -> None:
        flower.ensure_identity(1)
        self.shown, self.asked, self._ready = shown, [], []

    def get_node_ids(self) -> list[int]:
        return [5]

    def push_messages(self, outgoing):
        for message in outgoing:
            flower.stamp(message, message_id=flower.new_message_id())
            self.asked.append(take_heads(message.content))
            content = messages.encode_description("cleveland", {})
            put_heads(content, [self.shown])
            self._ready.append(Message(content, reply_to=message))
            yield message.metadata.message_id

    def wait_messages(self, ids, timeout_s):
        here, self._ready = self._ready, []
        return here


def test_a_site_is_shown_what_it_signed(store: Store) -> None:
    encoder = messages.RequestEncoder("run", "{}", "app")
    shown = []
    for text in (head(3), head(4)):
        grid = Grid(text)
        backend = GridBackend(grid, encoder, lambda _: "cleveland", heads=StoredHeads(store))
        assert backend.clients() == ["cleveland"]
        shown += grid.asked
    assert shown == [(), (head(3),)]
    assert StoredHeads(store).remembered("cleveland") == (head(4),)
