"""A site in a masked study against a server that asks otherwise: nothing leaves, and nothing is charged to the outbox."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Message

from client.policy import MaskRules, SiteRules
from fedlearn.arrays import specs_of
from fedlearn.errors import FedlearnError, PolicyRefusedError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.local import initial_weights
from fedlearn.learning.messages import MESSAGE_TYPES
from fedlearn.learning.strategy import ServerState
from fedlearn.learning.vectors import masking_plan, subject_of
from fedlearn.link import flower
from fedlearn.link.enrolment import CertificateEnrolment
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.enrolment import entries_from_bytes, entries_to_bytes, identities_of
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.messages import to_bytes
from fedlearn.secagg.plan import Terms
from fedlearn.secagg.server import ServerRound
from fedlearn.tasks import load_task
from tests.support.desk_site import DeskSites
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

MASKED = tiny_study("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20")
PLAIN = tiny_study()
MODEL = initial_weights(load_task(NAME, {}), MASKED)
LENGTH = sum(array.size for array in MODEL.values())


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


class Server:
    """Says what a test wants to sites that answer."""

    def __init__(self, bundles, study=MASKED):
        flower.ensure_identity(7)
        self.sites = DeskSites(NAME)
        self._handlers = {name: self.sites.handler(bundle) for name, bundle in bundles.items()}
        self._encoder = messages.RequestEncoder("run-1", study.to_json(), "any")

    async def ask(self, name, exchange, body=b"", *, round_=1, attempt=1, length=LENGTH, model=MODEL, digest=None):
        said = digest or broadcast_digest(ServerState(model, {}))
        work = Work(round_, attempt, (name,), model, {}, said, {}, 60.0)
        content = self._encoder.encode(exchange, work, {name: body}, length)[name]
        reply = await self._handlers[name](Message(content, 5, MESSAGE_TYPES[exchange]))
        return messages.decode_said(name, reply.content)

    async def roster(self):
        entries = [entries_from_bytes((await self.ask(name, Exchange.CHECK_IN)).entry)[0] for name in CLIENTS]
        return entries_to_bytes(entries)

    async def keyed(self, bundles, length=LENGTH):
        """Everybody shares keys; what an honest server would say to each next."""
        said = [await self.ask(name, Exchange.CHECK_IN, length=length) for name in CLIENTS]
        entries = [entries_from_bytes(one.entry)[0] for one in said]
        trust = identities_of(CertificateEnrolment(next(iter(bundles.values())).ca_pem), entries)
        subject = subject_of(MASKED, broadcast_digest(ServerState(MODEL, {})))
        made = ServerRound(Terms("run-1", AttemptId(1, 1), masking_plan(MASKED, length)), trust, subject)
        for entry in entries:
            made.receive(entry.check_in.client, entry.check_in)
        made.close()
        roster = entries_to_bytes(entries)
        for name in CLIENTS:
            made.receive(name, from_client((await self.ask(name, Exchange.SHARE, roster, length=length)).body))
        return {name: to_bytes(message) for name, message in made.close().items()}

    def outbox(self, name):
        """Releases that were committed."""
        return list(self.sites._sites[name]._gate.releases())


async def refused(asked, error=SecureAggregationError):
    with pytest.raises(error) as caught:
        await asked
    return caught.value


async def test_an_update_without_keys_does_not_leave(bundles):
    server = Server(bundles)
    for body in (b"", b"no delivery"):
        await refused(server.ask("ada", Exchange.TRAIN, body))
    await server.roster()
    error = await refused(server.ask("ada", Exchange.TRAIN, b""))
    assert error.breach is Breach.EQUIVOCATION, "its keys are bound to nothing yet"
    assert server.outbox("ada") == []


async def test_nothing_is_opened_that_was_not_masked(bundles):
    server = Server(bundles)
    roster = await server.roster()
    await server.ask("ada", Exchange.SHARE, roster)
    error = await refused(server.ask("ada", Exchange.UNMASK, b"survivors"), PolicyRefusedError)
    assert "nothing-to-unmask" in error.message
    assert server.outbox("ada") == []


async def test_a_roster_with_a_stranger_is_refused(bundles, tmp_path):
    server = Server(bundles)
    entries = entries_from_bytes(await server.roster())
    other = create_authority(tmp_path / "other")
    impostor = Server({"dee": TlsBundle.load(issue(other, "dee", Role.CLIENT, tmp_path / "dee"))})
    forged = entries_from_bytes((await impostor.ask("dee", Exchange.CHECK_IN)).entry)
    error = await refused(server.ask("ada", Exchange.SHARE, entries_to_bytes([*entries[:3], *forged])))
    assert error.breach is Breach.NOT_ENROLLED
    assert error.culprits == ("dee",)


async def test_keys_for_another_length_than_the_models_mask_nothing(bundles):
    """A server that claims a shorter model, so that some of it would be left without a mask."""
    server = Server(bundles)
    told = await server.keyed(bundles, length=LENGTH - 1)
    asked = server.ask("ada", Exchange.TRAIN, told["ada"], length=LENGTH - 1)
    error = await refused(asked, RemoteProtocolError)
    assert "keys were agreed for" in error.message
    assert server.outbox("ada") == []


async def test_a_model_of_its_own_for_one_client_is_refused(bundles):
    """Every client agreed on keys for one model; a server that then sends another, to tell one update from the rest, gets nothing."""
    server = Server(bundles)
    told = await server.keyed(bundles)
    other = {name: array + np.float32(1) for name, array in MODEL.items()}
    error = await refused(server.ask("ada", Exchange.TRAIN, told["ada"], model=other))
    assert error.breach is Breach.EQUIVOCATION
    error = await refused(
        server.ask("ada", Exchange.TRAIN, told["ada"], model=other, digest=broadcast_digest(ServerState(MODEL, {}))),
        RemoteProtocolError,
    )
    assert "have the digest" in error.message
    assert server.outbox("ada") == []
    assert (await server.ask("ada", Exchange.TRAIN, told["ada"])).body, "the right one is still trained on"


async def test_exchanges_of_secure_aggregation_have_no_place_in_a_plain_study(bundles):
    server = Server(bundles, PLAIN)
    for exchange in (Exchange.CHECK_IN, Exchange.SHARE, Exchange.UNMASK):
        await refused(server.ask("ada", exchange), RemoteProtocolError)


async def test_a_site_may_insist_on_masks(bundles):
    server = Server(bundles, PLAIN)
    site = server.sites._sites["ada"]
    site._rules = SiteRules(tasks=(NAME,), secure_aggregation=MaskRules())
    error = await refused(server.ask("ada", Exchange.TRAIN), PolicyRefusedError)
    assert "under masks only" in error.message
    assert server.outbox("ada") == []


async def test_a_site_without_keys_takes_part_in_no_masked_study(bundles):
    server = Server(bundles)
    server.sites._sites["ada"]._masking = None
    assert "no keys" in (await refused(server.ask("ada", Exchange.CHECK_IN), PolicyRefusedError)).message


async def test_a_length_that_nobody_could_sum_is_refused(bundles):
    server = Server(bundles)
    for length in (0, -1, 2**40):
        await refused(server.ask("ada", Exchange.CHECK_IN, length=length), FedlearnError)


def test_lengths_fit_the_model():
    assert sum(int(np.prod(spec.shape)) for spec in specs_of(MODEL).values()) == LENGTH
