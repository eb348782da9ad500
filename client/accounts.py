"""The site's ledger as the agent keeps it: one data set, in a folder of its own, signed with the site's TLS key.

Why that key: it lies outside the state folder. Whoever loses, deletes or puts back the state folder still has it, so a head that a server remembers
is recognised as the site's own, and a ledger that begins anew is refused instead of forgetting what was spent. A renewed certificate
with a new key is noted in the ledger as the key that signs from there on.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Self

from fedlearn.errors import StateError
from fedlearn.link.closing import read_closing
from fedlearn.privacy.chain import SignedHead
from fedlearn.privacy.ledger_file import LEDGERS, LedgerFolder
from fedlearn.release.keys import admission_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from fedlearn.link import TlsBundle
    from fedlearn.privacy.budget import Budget
    from fedlearn.privacy.chain import SiteKey
    from fedlearn.privacy.ledger import Ledger
    from fedlearn.release.charge import Charge

log = logging.getLogger("fedlearn.client")


def ledger_folder(state_dir: Path, dataset: str) -> Path:
    """Where a data set's ledger lies. Two names that give one folder are told apart by the ledger itself."""
    return state_dir / LEDGERS / (re.sub(r"[^A-Za-z0-9._-]", "-", dataset).lstrip(".-") or "data")


def signing_key(bundle: TlsBundle) -> SiteKey:
    """The site's own key."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: SiteKey = load_pem_private_key(bundle.key_pem, password=None)  # type: ignore[assignment]  # a bundle's is P-256
    return key


class Accounts:
    """What may be spent of one data set, what was, and what servers remember of that.

    Args:
        folder: see `ledger_folder`.
        site: the name in the site's certificate.
        dataset: the data's name in the site's policy.
        key: see `signing_key`.
        budgets: of the policy, by account; noted in the ledger where they changed.
        authority_pem: who certifies coordinators, for their word that a run is over.

    Raises:
        StateError: see `LedgerFolder`.
    """

    def __init__(
        self,
        folder: Path,
        site: str,
        dataset: str,
        key: SiteKey,
        budgets: Mapping[str, Budget],
        authority_pem: bytes = b"",
    ) -> None:
        self._authority_pem = authority_pem
        self._folder = LedgerFolder(folder, site, dataset, key)
        self._behind: StateError | None = None
        try:
            self.ledger.note_budgets(budgets)
        except BaseException:
            self._folder.close()
            raise

    @property
    def ledger(self) -> Ledger:
        """The ledger: the gate's book."""
        return self._folder.ledger

    def head(self) -> str:
        """How far the ledger has come, signed, for a server to remember."""
        return self.ledger.head().to_text()

    def check(self, heads: Sequence[str]) -> None:
        """Compare the ledger with what a server remembers. Once it was found behind, nothing more is admitted in this process.

        Args:
            heads: that came with a request. One that this site has not signed says nothing, or a server could lock the site out.

        Raises:
            StateError: the ledger is behind a head that this site signed: an old copy was put back, or it began anew.
        """
        for text in heads:
            try:
                head = SignedHead.from_text(text)
            except StateError:
                log.warning("the server shows something that is no ledger head; it is ignored")
                continue
            if not self.ledger.owns(head):
                if head.data_set == self.ledger.data_set:
                    log.warning(
                        "the server shows a head of this data set's ledger that this site has not signed; it is ignored"
                    )
                continue
            try:
                self.ledger.check_remembered(head)
            except StateError as error:
                log.error("%s", error)  # noqa: TRY400  # a foreseen error has no traceback
                self._behind = error
        if self._behind is not None:
            raise self._behind

    def close_run(self, run: str, admission: Charge, word: bytes, *, released: int) -> None:
        """Give back what a run that was charged whole did not use; nothing where it was not charged here.

        Args:
            run: the run's name.
            admission: what was charged for all of it.
            word: the coordinator's; see `fedlearn.link.closing`.
            released: attempts in which an update left this site.

        Raises:
            RemoteProtocolError: it is not the word of a coordinator of this site's authority.
            StateError: its count cannot be true, or the signature is wrong. Nothing is given back.
        """
        key = admission_key(run, admission)
        closed, coordinator = read_closing(word, run, self._authority_pem)
        if self.ledger.has(key):
            self.ledger.close(key, closed, coordinator, released=released)

    def close(self) -> None:
        """Let go of the ledger."""
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
