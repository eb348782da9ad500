"""A hostile coordinator where survivors are agreed upon, and one that opens a round twice, against real agents: nothing leaves for a second set."""

from __future__ import annotations

import json

import pytest

from client.guard import guard_of, is_noisy
from client.policy import MaskRules, SiteRules
from fedlearn.errors import PolicyRefusedError
from fedlearn.learning.backend import Exchange
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.release.keys import AGREE, TRAIN, UNMASK
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.messages import Agreements, Survivors, from_bytes, to_bytes
from tests.support.hostile_coordinator import MASKED, Coordinator
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

AGREED = MASKED.with_overrides(["secure_aggregation.profile=malicious"])
AGAIN = (1, 2)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


async def refused(asked, error=SecureAggregationError):
    with pytest.raises(error) as caught:
        await asked
    return caught.value


async def agreed(server):
    """Everybody signs; what an honest server would say to each to open the sum."""
    made, survivors = await server.trained()
    for name in CLIENTS:
        made.receive(name, from_client((await server.said(name, Exchange.AGREE, survivors[name])).body))
    return {name: to_bytes(message) for name, message in made.close().items()}


async def opened(server):
    """Everybody has opened the first attempt at the first round."""
    _, survivors = await server.trained()
    for name in CLIENTS:
        await server.said(name, Exchange.UNMASK, survivors[name])


def fewer(survivors):
    """Without dee, told to ada."""
    told = from_bytes(survivors)
    return to_bytes(Survivors(told.survivors & ~8, told.inclusions[:2]))


async def test_a_second_set_of_survivors_is_not_signed_not_even_by_a_site_that_was_killed(bundles):
    server = Coordinator(bundles, AGREED)
    _, survivors = await server.trained()
    signed = await server.said("ada", Exchange.AGREE, survivors["ada"])
    for _ in range(2):
        error = await refused(server.said("ada", Exchange.AGREE, fewer(survivors["ada"])), PolicyRefusedError)
        assert "other-request" in error.message
        assert await server.said("ada", Exchange.AGREE, survivors["ada"]) == signed
        server.sites.kill("ada")


async def test_nothing_is_opened_on_the_servers_word_alone(bundles):
    server = Coordinator(bundles, AGREED)
    _, survivors = await server.trained()
    for name in ("ada", "bob"):
        error = await refused(server.said(name, Exchange.UNMASK, survivors[name]))
        assert error.breach is Breach.UNEXPECTED
        await server.said("bob", Exchange.AGREE, survivors["bob"])
    assert (server.outbox("ada"), server.outbox("bob")) == ([TRAIN], [AGREE, TRAIN])


async def test_nothing_is_opened_without_a_quorums_signatures(bundles):
    server = Coordinator(bundles, AGREED)
    told = from_bytes((await agreed(server))["ada"])
    assert told.signers == 15
    attacks = {
        "ada": (Agreements(3, told.signatures[:2]), Breach.BELOW_THRESHOLD),
        "bob": (Agreements(15, (told.signatures[1], *told.signatures[1:])), Breach.BAD_SIGNATURE),
        "cyd": (Agreements(31, (*told.signatures, told.signatures[0])), Breach.WRONG_SET),
    }
    for name, (lie, breach) in attacks.items():
        assert (await refused(server.said(name, Exchange.UNMASK, to_bytes(lie)))).breach is breach
        assert (await refused(server.said(name, Exchange.UNMASK, to_bytes(told)))).breach is Breach.UNEXPECTED
        assert UNMASK not in server.outbox(name)
    assert (await server.said("dee", Exchange.UNMASK, to_bytes(told))).body


async def test_an_opening_does_not_leave_as_an_agreement(bundles):
    server = Coordinator(bundles)
    _, survivors = await server.trained()
    error = await refused(server.said("ada", Exchange.AGREE, survivors["ada"]))
    assert "not agreed upon" in error.message
    assert server.outbox("ada") == [TRAIN]
    assert (await server.said("ada", Exchange.UNMASK, survivors["ada"])).body


async def test_who_has_opened_a_sum_gives_neither_keys_nor_vector_for_the_round_again(bundles):
    server = Coordinator(bundles)
    early = await server.check_ins(at=AGAIN)
    await opened(server)
    for asked in (
        server.keyed(entries=early, at=AGAIN),
        server.check_ins(at=AGAIN),
        server.said("ada", Exchange.TRAIN, at=AGAIN),
    ):
        error = await refused(asked, PolicyRefusedError)
        assert "helped to open the sum of round 1 attempt 1" in error.message
    server.sites.kill("ada")
    await refused(server.said("ada", Exchange.CHECK_IN, at=AGAIN), PolicyRefusedError)
    assert server.outbox("ada") == [TRAIN, UNMASK]
    assert (await server.said("ada", Exchange.CHECK_IN, at=(2, 1))).entry, "the next round is another model"


async def test_a_policy_may_let_a_round_be_opened_again(bundles):
    rules = SiteRules(tasks=(NAME,), secure_aggregation=MaskRules(required=False, reopen=True))
    server = Coordinator(bundles, rules=rules)
    await opened(server)
    _, survivors = await server.trained(at=AGAIN)
    assert (await server.said("ada", Exchange.UNMASK, survivors["ada"], at=AGAIN)).body


@pytest.mark.parametrize(
    ("plan", "noisy"),
    [
        ({"unit": "record", "noise_multiplier": 1.0, "delta": 1e-3}, True),
        ({"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2, "units": 4}, False),
        ({"unit": "client", "noise_multiplier": 1.0, "delta": 1e-2, "units": 4, "mechanism": "distributed"}, True),
    ],
    ids=["each record", "the server's", "the clients' together"],
)
def test_whose_noise_lets_an_update_leave_again(plan, noisy):
    """Only noise that is in the update itself, and paid for with it, is new in the next attempt."""
    values = ", ".join(f"{key}={json.dumps(value)}" for key, value in plan.items())
    masks = "secure_aggregation={enabled=true, max_clients=4}"
    study = tiny_study("train.batch_size=32", "cohort.wait_for=4", masks, f"privacy={{{values}}}")
    assert is_noisy(guard_of(study.to_json(), "tiny")) is noisy
