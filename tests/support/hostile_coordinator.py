"""A coordinator that says what a test wants, to the real agents of four sites: what each message is, is up to the test."""

from __future__ import annotations

import itertools

from flwr.app import Message

from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.local import initial_weights
from fedlearn.learning.strategy import ServerState
from fedlearn.learning.vectors import masking_plan, subject_of
from fedlearn.link import flower
from fedlearn.link.enrolment import CertificateEnrolment
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.enrolment import entries_from_bytes, entries_to_bytes, identities_of
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.messages import to_bytes
from fedlearn.secagg.plan import Terms
from fedlearn.secagg.server import ServerRound
from fedlearn.tasks import load_task
from tests.support.desk_site import DeskSites
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

MASKED = tiny_study("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20")
MODEL = initial_weights(load_task(NAME, {}), MASKED)
LENGTH = sum(array.size for array in MODEL.values())
RUNS = itertools.count(1)


class Coordinator:
    """Four sites behind their real policies, gates and keys, and whoever asks them.

    Args:
        bundles: their certificates.
        study: what is asked for where a test says nothing else.
        rules: the sites' policy.
        accounts_of: see `DeskSites`.
        model_with_shares: whether the model rides on SHARE, as on our link, or on TRAIN.
    """

    def __init__(self, bundles, study=MASKED, rules=None, accounts_of=None, *, model_with_shares=True):
        self._model_with_shares = model_with_shares
        flower.ensure_identity(7)
        self.bundles, self.study, self.run = bundles, study, f"run-{next(RUNS)}"
        self.sites = DeskSites(NAME, rules=rules, accounts_of=accounts_of)
        self._handlers = {name: self.sites.handler(bundle) for name, bundle in bundles.items()}

    def message(
        self, name, exchange, body=b"", *, at=(1, 1), study=None, run=None, length=LENGTH, model=MODEL, **facts
    ):
        """A request; `facts` overwrite what it says of itself, `kind` its type."""
        kind = facts.pop("kind", messages.MESSAGE_TYPES[exchange])
        text, ahead = (study or self.study).to_json(), self._model_with_shares
        encoder = messages.RequestEncoder(run or self.run, text, "any", model_with_shares=ahead)
        digest = broadcast_digest(ServerState(model, {}))
        work = Work(at[0], at[1], (name,), model, {}, digest, {}, 60.0)
        content = encoder.encode(exchange, work, {name: body}, length)[name]
        record = content.config_records[messages.RECORD]
        for key, value in facts.items():
            record[key] = value
        return Message(content, 5, kind)

    async def ask(self, name, exchange, body=b"", **changes):
        """What a site answers to it."""
        return (await self._handlers[name](self.message(name, exchange, body, **changes))).content

    async def said(self, name, exchange, body=b"", **changes):
        """The same of an exchange of secure aggregation."""
        return messages.decode_said(name, await self.ask(name, exchange, body, **changes))

    async def check_ins(self, names=CLIENTS, **changes):
        """Everybody's check-in, by name."""
        said = {name: await self.said(name, Exchange.CHECK_IN, **changes) for name in names}
        return {name: entries_from_bytes(one.entry)[0] for name, one in said.items()}

    async def keyed(self, names=CLIENTS, entries=None, **changes):
        """Everybody shares keys.

        Returns:
            The honest server of the attempt, and what it would tell each next.
        """
        entries = entries or await self.check_ins(names, **changes)
        at, study = AttemptId(*changes.get("at", (1, 1))), changes.get("study", self.study)
        authority = CertificateEnrolment(next(iter(self.bundles.values())).ca_pem)
        model = changes.get("model", MODEL)
        terms = Terms(changes.get("run", self.run), at, masking_plan(study, changes.get("length", LENGTH)))
        subject = subject_of(study, broadcast_digest(ServerState(model, {})))
        server = ServerRound(terms, identities_of(authority, list(entries.values())), subject)
        for name, entry in entries.items():
            server.receive(name, entry.check_in)
        server.close()
        roster = entries_to_bytes(entries[name] for name in sorted(entries))
        for name in names:
            server.receive(name, from_client((await self.said(name, Exchange.SHARE, roster, **changes)).body))
        return server, {name: to_bytes(message) for name, message in server.close().items()}

    async def trained(self, names=CLIENTS, **changes):
        """Keys, and everybody's masked vector.

        Returns:
            The server that has taken them all, and what it would tell each to open the sum.
        """
        server, told = await self.keyed(names, **changes)
        for name in names:
            server.receive(name, from_client((await self.said(name, Exchange.TRAIN, told[name], **changes)).body))
        return server, {name: to_bytes(message) for name, message in server.close().items()}

    def outbox(self, name):
        """The exchanges of the releases that a site has committed."""
        return [release.key.exchange for release in self.sites.releases(name)]
