"""Signed heads of sites' ledgers, as they travel beside messages: a server remembers how far each site's ledger had come.

A site signs the head after every answer; the server keeps the latest and shows it with every request. A site whose ledger is behind what it signed
itself knows that an old copy was put back. The server need not be trusted for it: it cannot make a head up, only forget one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from flwr.app import ConfigRecord

from fedlearn.errors import LimitExceededError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flwr.app import RecordDict

LEDGER: Final = "ledger"
"""The record that holds them."""
MAX_HEADS: Final = 64
"""The most data sets of one site."""
MAX_HEAD_BYTES: Final = 2_000
"""The longest head."""


class HeadMemory(Protocol):
    """What a server remembers. Both may be called from any thread."""

    def remembered(self, client: str) -> Sequence[str]:
        """The latest head of each of a client's data sets, as text."""
        ...

    def remember(self, client: str, head: str) -> None:
        """Keep a head that a client sent, unless a later one is kept already. What is no head of that client is ignored."""
        ...


def put_heads(content: RecordDict, heads: Sequence[str]) -> None:
    """Write heads into a message's content; nothing where there are none."""
    if heads:
        content[LEDGER] = ConfigRecord({"heads": list(heads)})


def take_heads(content: RecordDict) -> tuple[str, ...]:
    """Take the heads out of a message's content; none where there are none.

    Raises:
        RemoteProtocolError: the record holds something else.
        LimitExceededError: too many, or one is too long.
    """
    record = content.pop(LEDGER, None)
    if record is None:
        return ()
    heads = record.get("heads") if isinstance(record, ConfigRecord) else None
    if not isinstance(heads, list) or not all(isinstance(head, str) for head in heads):
        raise RemoteProtocolError(f"message: record {LEDGER!r} holds no list of heads")
    texts = tuple(str(head) for head in heads)
    if len(texts) > MAX_HEADS or any(len(text.encode(errors="replace")) > MAX_HEAD_BYTES for text in texts):
        raise LimitExceededError(
            f"message: {len(texts)} ledger heads, limits are MAX_HEADS = {MAX_HEADS} of MAX_HEAD_BYTES = {MAX_HEAD_BYTES}"
        )
    return texts
