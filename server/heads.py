"""How far each site's ledger had come, as the site itself signed it: what a coordinator remembers for its sites."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import sqlalchemy as sa

from fedlearn.errors import StateError
from fedlearn.learning.heads import MAX_HEADS
from fedlearn.learning.messages import MAX_NAME_BYTES
from fedlearn.privacy.chain import MAX_RECORDS, SignedHead
from server import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.store import Store

log = logging.getLogger("fedlearn.server")


class StoredHeads:
    """`fedlearn.learning.heads.HeadMemory` in the coordinator's database, over all runs.

    A head is kept under the name in the certificate of whoever sent it, so that no site can speak for another. It is not this end that must
    check the signature: the site does when it sees the head again.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def remembered(self, client: str) -> Sequence[str]:
        table = schema.ledger_heads
        query = sa.select(table.c.head).where(table.c.client == client).order_by(table.c.data_set)
        with self._store.reading() as db:
            return tuple(str(head) for head in db.execute(query).scalars())

    def remember(self, client: str, head: str) -> None:
        try:
            told = SignedHead.from_text(head)
        except StateError as error:
            log.warning("%s sent no ledger head: %s", client, error.message)
            return
        if told.site != client or not _storable(told):
            log.warning("%s sent a ledger head of %.80r, %.80r; it is ignored", client, told.site, told.data_set)
            return
        table = schema.ledger_heads
        place = sa.and_(table.c.client == client, table.c.data_set == told.data_set)
        with self._store.writing() as db:
            known = db.execute(sa.select(table.c.seq).where(place)).scalar_one_or_none()
            if known is not None and known >= told.seq:
                if known > told.seq:
                    log.warning("%s: its ledger of %r is behind what it had signed before", client, told.data_set)
                return
            if known is not None:
                db.execute(sa.update(table).where(place).values(seq=told.seq, head=head))
                return
            count = db.execute(sa.select(sa.func.count()).where(table.c.client == client)).scalar_one()
            if count >= MAX_HEADS:
                log.warning("%s has %d ledgers here, no more are remembered", client, count)
                return
            db.execute(sa.insert(table).values(client=client, data_set=told.data_set, seq=told.seq, head=head))


def _storable(head: SignedHead) -> bool:
    name = head.data_set
    return 1 <= len(name) <= MAX_NAME_BYTES and name.isascii() and 0 <= head.seq < MAX_RECORDS
