"""A site with a ledger and a worker that answers what the test wants: no process, no torch, a real gate on a real disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, RecordDict

from client.accounts import Accounts, ledger_folder
from client.frames import Frame, Kind
from client.policy import SiteRules, load_rules
from client.site import Site
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.heads import put_heads
from fedlearn.learning.strategy import ServerState
from fedlearn.learning.update import Update
from fedlearn.link import flower
from fedlearn.privacy.budget import EpsilonCharger
from fedlearn.release.site import SiteGate
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.study import Study, parse_study

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
APP = "a" * 64
SITE = "cleveland"
MODEL = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}
BUDGET = "mixed_units = true\n[budgets.record]\nepsilon = 50.0\ndelta = 1e-5\n[budgets.client]\nepsilon = 50.0\ndelta = 1e-5\n"
TYPES = {Exchange.DESCRIBE: "query", Exchange.TRAIN: "train", Exchange.EVALUATE: "evaluate"}


def study_of(privacy: str, rounds: int = 5) -> Study:
    return parse_study(f'name = "s"\nrounds = {rounds}\n[task]\nname = "hospital/heart"\n[privacy]\n{privacy}')


RECORD = study_of('unit = "record"\nnoise_multiplier = 2.0\ndelta = 1e-5\n')
CLIENT = study_of('unit = "client"\nnoise_multiplier = 5.0\ndelta = 1e-3\nunits = 10\nclip_l2 = 1.0\n')
ADAPTIVE = study_of(
    'unit = "client"\nnoise_multiplier = 5.0\ndelta = 1e-3\nunits = 10\nclip_l2 = 1.0\nclipping = "adaptive"\n'
)


def ask(
    study: Study,
    round_: int = 1,
    attempt: int = 1,
    *,
    run: str = "run-1",
    exchange: Exchange = Exchange.TRAIN,
    shared: Mapping[str, np.ndarray] | None = None,
    heads: tuple[str, ...] = (),
) -> Message:
    """A server's message to the site; every round has another model."""
    flower.ensure_identity(7)
    encoder = messages.RequestEncoder(run, study.to_json(), APP)
    if exchange is Exchange.DESCRIBE:
        content = encoder.describe()
    else:
        model = {name: array + np.float32(round_) for name, array in MODEL.items()}
        digest = broadcast_digest(ServerState(model, dict(shared or {})))
        work = Work(round_, attempt, (SITE,), model, dict(shared or {}), digest, {}, 60.0)
        content = encoder.encode(exchange, work)[SITE]
    put_heads(content, heads)
    return Message(content, 5, TYPES[exchange])


def small_update() -> RecordDict:
    """What an honest worker answers."""
    delta = {"w": np.full((3, 2), 0.1, np.float32), "b": np.full(2, -0.1, np.float32)}
    return messages.encode_update(Update({"delta": delta}, examples=1))


class Worker:
    """In place of a `Crew`: answers what it is told to, in this process."""

    def __init__(self, answer: Callable[[], RecordDict] = small_update) -> None:
        self.answer, self.calls = answer, 0

    async def call(self, run: str, frame: Frame) -> Frame:
        del run
        self.calls += 1
        pieces = list(frame.buffers)
        asked = flower.decode(pieces[0], pieces[1 : 1 + frame.header["message"]])
        who = asked.metadata.message_type == "query" and self.answer is small_update
        content = messages.encode_description(SITE, {}) if who else self.answer()
        wire = flower.encode(Message(content, reply_to=asked))
        return Frame(Kind.DONE, {"message": len(wire.buffers), "state": -1}, [wire.metadata, *wire.buffers])


class PrivateSite:
    """The site with what it stands on."""

    def __init__(self, folder: Path, rules: SiteRules, worker: Worker, ca_pem: bytes) -> None:
        assert rules.dataset is not None
        self.worker = worker
        self._journal = SqliteJournal(folder / "releases")
        budgets = rules.accounts()
        ledger = ledger_folder(folder, rules.dataset)
        self.accounts = Accounts(ledger, SITE, rules.dataset, KEY, budgets, ca_pem)
        self.gate = SiteGate(self._journal, EpsilonCharger(budgets), book=self.accounts.ledger)
        self.site = Site(worker, rules, self.gate, {"client-id": SITE}, self.accounts)  # type: ignore[arg-type]

    def costs(self, account: str) -> list[str]:
        """What stands in the ledger."""
        return [charge.cost for charge in self.accounts.ledger.charges(account)]

    def close(self) -> None:
        self.accounts.close()
        self._journal.close()


@contextlib.contextmanager
def private_site(
    folder: Path, worker: Worker | None = None, policy: str = BUDGET, ca_pem: bytes = b""
) -> Iterator[PrivateSite]:
    """A site on a state folder; made again on the same folder it knows what was before."""
    folder.mkdir(exist_ok=True)
    (folder / "policy.toml").write_text(policy)
    rules = load_rules(folder / "policy.toml").with_defaults("hospital/heart", APP)
    made = PrivateSite(folder, rules, worker or Worker(), ca_pem)
    try:
        yield made
    finally:
        made.close()
