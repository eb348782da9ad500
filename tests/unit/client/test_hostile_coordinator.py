"""A hostile coordinator against real agents: policy, gate, keys and the worker's code. Each attack ends in a named error, and nothing leaves."""

from __future__ import annotations

import pytest

from fedlearn.errors import FedlearnError, PolicyRefusedError, RemoteProtocolError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MESSAGE_TYPES
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.messages import Agreements, Roster, to_bytes
from fedlearn.secagg.server import Stage
from tests.support.hostile_coordinator import MASKED, Coordinator
from tests.support.tiny_task import CLIENTS, tiny_study

PLAIN = tiny_study()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


async def refused(asked, error, *says):
    with pytest.raises(error) as caught:
        await asked
    for words in says:
        assert words in caught.value.message, caught.value.message
    return caught.value


@pytest.mark.parametrize("study", [MASKED, PLAIN], ids=["masked", "plain"])
@pytest.mark.parametrize("said", Exchange)
async def test_a_message_whose_type_is_not_what_it_says_is_answered_by_nobody(bundles, said, study):
    """`evaluate` by its word and `train` by its type: the worker would train, and neither gate nor masks would see it."""
    server = Coordinator(bundles, study)
    for kind in {*MESSAGE_TYPES.values(), "train.default"} - {MESSAGE_TYPES[said]}:
        await refused(server.ask("ada", said, kind=kind), RemoteProtocolError, "has the type")
    assert server.outbox("ada") == []


async def test_an_evaluation_that_the_study_does_not_have(bundles):
    """Metrics of any model that a server likes are answers about people: where the study has none, there are none."""
    server = Coordinator(bundles, tiny_study("secure_aggregation.enabled=true", "evaluate.every=0"))
    await refused(server.ask("ada", Exchange.EVALUATE), PolicyRefusedError, "the study has none")


@pytest.mark.parametrize("at", [(0, 1), (-1, 1), (1, 0), (4, 1), (2**62, 1), (1, 2**31)])
@pytest.mark.parametrize("exchange", [Exchange.CHECK_IN, Exchange.SHARE, Exchange.TRAIN, Exchange.UNMASK])
async def test_a_round_that_the_study_does_not_have(bundles, exchange, at):
    """Keys for a round far ahead would make every later one a replay."""
    server = Coordinator(bundles)
    await refused(server.ask("ada", exchange, at=at), FedlearnError)
    assert server.outbox("ada") == []
    assert (await server.trained())[0].stage is Stage.OPEN


async def test_an_unmask_request_that_is_another_message(bundles):
    """What was told before, or a message of another exchange, gets no shares out of anybody, and the right one is answered."""
    server = Coordinator(bundles)
    entries = await server.check_ins()
    made, told = await server.keyed(entries=entries)
    for name in CLIENTS:
        made.receive(name, from_client((await server.said(name, Exchange.TRAIN, told[name])).body))
    survivors = {name: to_bytes(message) for name, message in made.close().items()}
    roster = to_bytes(Roster(tuple(entry.check_in for entry in entries.values())))
    for body in (told["ada"], roster, to_bytes(Agreements(7, (b"x",) * 3)), b"", b"\xff"):
        error = await refused(server.ask("ada", Exchange.UNMASK, body), SecureAggregationError)
        assert error.breach in {Breach.UNEXPECTED, Breach.MALFORMED}
    assert server.outbox("ada") == ["train"]
    for name in CLIENTS:
        made.receive(name, from_client((await server.said(name, Exchange.UNMASK, survivors[name])).body))
    made.close()
    assert made.stage is Stage.OPENED
