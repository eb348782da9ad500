"""Shares while a site trains: its real agent, policy, gate and keys, and a worker that a test holds up."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.accounts import Accounts, ledger_folder
from client.policy import load_rules
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.strategy import ServerState
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.release.keys import TRAIN
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.enrolment import entries_to_bytes
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.server import Stage
from tests.support.hostile_coordinator import MASKED, MODEL, Coordinator
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

OTHER = {name: array + np.float32(1) for name, array in MODEL.items()}
MASKS = ("secure_aggregation.enabled=true", "secure_aggregation.max_clients=4", "evaluate.every=0")
ACCOUNT = "tiny/record/seeded"
PRIVATE = 'privacy={unit="record", noise_multiplier=1.0, delta=0.001, clip_l2=0.3, steps=2, seeded=true}'


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


@pytest.fixture
def private(bundles, tmp_path):
    """Makes a coordinator whose sites keep a ledger with this budget."""
    made = []

    def make(epsilon, *overrides):
        budget = f"[budgets.record]\nepsilon = {epsilon}\ndelta = 1e-4\n"
        (tmp_path / "policy.toml").write_text(f'tasks = ["{NAME}"]\ndataset = "tiny"\nseeded = true\n{budget}')
        rules = load_rules(tmp_path / "policy.toml")

        def accounts(name):
            key = Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))
            return Accounts(ledger_folder(tmp_path / name, "tiny"), name, "tiny", key, rules.accounts())

        made.append(Coordinator(bundles, tiny_study(PRIVATE, *MASKS, *overrides), rules, accounts))
        return made[-1]

    yield make
    for server in made:
        server.sites.close()


async def refused(asked, error, *says):
    with pytest.raises(error) as caught:
        await asked
    for words in says:
        assert words in caught.value.message, caught.value.message
    return caught.value


async def roster_of(server, **changes):
    entries = await server.check_ins(**changes)
    return entries_to_bytes(entries[name] for name in sorted(entries))


def begun(server, name="ada"):
    """The trainings that wait at a site."""
    return list(server.sites._sites[name]._masked.begun._trainings.values())


async def over(server, training, name="ada"):
    """Wait until a training has ended and its reservation is given back."""
    await asyncio.wait({training._task})
    while running := set(server.sites._sites[name]._outbox._running):
        await asyncio.wait(running)


async def test_a_site_trains_while_shares_are_exchanged(bundles):
    """Training ends only when the shares were answered, and TRAIN is sent only when training has ended: neither waits for the other."""
    server = Coordinator(bundles)
    shared, trained = threading.Event(), threading.Semaphore(0)

    def works():
        assert shared.wait(20.0), "the shares wait for the training"
        trained.release()

    for name in CLIENTS:
        server.sites.desks[name].works = works
    made, told = await server.keyed()
    shared.set()
    for _ in CLIENTS:
        assert await asyncio.to_thread(trained.acquire, timeout=20.0), "the training waits for TRAIN"
    assert [server.outbox(name) for name in CLIENTS] == [[]] * 4
    for name in CLIENTS:
        made.receive(name, from_client((await server.said(name, Exchange.TRAIN, told[name])).body))
    made.close()
    assert made.stage is Stage.OPEN
    assert [server.outbox(name) for name in CLIENTS] == [["train"]] * 4
    assert begun(server) == []


@pytest.mark.parametrize("model_with_shares", [True, False])
async def test_the_model_comes_once(bundles, model_with_shares):
    server = Coordinator(bundles, model_with_shares=model_with_shares)
    brings = {exchange: "model" in server.message("ada", exchange).content for exchange in Exchange}
    assert [brings[Exchange.SHARE], brings[Exchange.TRAIN]] == [model_with_shares, not model_with_shares]
    assert not any(
        brings[exchange] for exchange in (Exchange.CHECK_IN, Exchange.REVEAL, Exchange.AGREE, Exchange.UNMASK)
    )
    _, told = await server.keyed()
    assert (await server.said("ada", Exchange.TRAIN, told["ada"])).body
    assert server.sites.desks["ada"].calls == 1


async def test_shares_that_are_asked_for_again_train_once(bundles):
    """A coordinator that was killed and comes back; before the update was asked for, and after."""
    server = Coordinator(bundles)
    roster = await roster_of(server)
    first, together = await asyncio.gather(*(server.said("ada", Exchange.SHARE, roster) for _ in range(2)))
    assert first.body == together.body == (await server.said("ada", Exchange.SHARE, roster)).body
    server = Coordinator(bundles)
    entries = await server.check_ins()
    roster = entries_to_bytes(entries[name] for name in sorted(entries))
    _, told = await server.keyed(entries=entries)
    sent = await server.said("ada", Exchange.TRAIN, told["ada"])
    await server.said("ada", Exchange.SHARE, roster)
    assert begun(server) == []
    assert (await server.said("ada", Exchange.TRAIN, told["ada"])).body == sent.body
    assert server.sites.desks["ada"].calls == 1
    assert server.outbox("ada") == ["train"]


async def test_a_restart_between_shares_and_train_drops_out_of_the_attempt(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    server.sites.kill("ada")
    await refused(server.ask("ada", Exchange.TRAIN, told["ada"]), RemoteProtocolError, "no training of", "began here")
    assert server.outbox("ada") == []
    assert (await server.said("bob", Exchange.TRAIN, told["bob"])).body
    _, told = await server.keyed(at=(1, 2))
    assert (await server.said("ada", Exchange.TRAIN, told["ada"], at=(1, 2))).body


async def test_a_restart_after_the_commit_sends_the_same_again(bundles):
    server = Coordinator(bundles)
    entries = await server.check_ins()
    _, told = await server.keyed(entries=entries)
    sent = await server.said("ada", Exchange.TRAIN, told["ada"])
    server.sites.kill("ada")
    roster = entries_to_bytes(entries[name] for name in sorted(entries))
    error = await refused(server.ask("ada", Exchange.SHARE, roster), SecureAggregationError)
    assert error.breach is Breach.SELF_CHANGED
    assert (await server.said("ada", Exchange.TRAIN, told["ada"])).body == sent.body
    assert server.sites.desks["ada"].calls == 1


async def test_another_model_for_the_same_keys_is_refused(bundles):
    """By SHARE or by TRAIN, with its arrays or by its name: and the right one is still sent."""
    server = Coordinator(bundles)
    entries = await server.check_ins()
    roster = entries_to_bytes(entries[name] for name in sorted(entries))
    _, told = await server.keyed(entries=entries)
    other = broadcast_digest(ServerState(OTHER, {}))
    await refused(server.ask("ada", Exchange.SHARE, roster, model=OTHER), PolicyRefusedError, "other-model")
    await refused(server.ask("ada", Exchange.SHARE, roster, model_digest=other), RemoteProtocolError, "have the digest")
    await refused(server.ask("ada", Exchange.TRAIN, told["ada"], model_digest=other), PolicyRefusedError, "other-model")
    server._model_with_shares = False
    asked = server.ask("ada", Exchange.TRAIN, told["ada"], model=OTHER)
    await refused(asked, PolicyRefusedError, "other-model")
    asked = server.ask("ada", Exchange.TRAIN, told["ada"], model=OTHER, model_digest=begun(server)[0].key.model_digest)
    await refused(asked, RemoteProtocolError, "have the digest")
    assert server.outbox("ada") == []
    server._model_with_shares = True
    assert (await server.said("ada", Exchange.TRAIN, told["ada"])).body
    assert server.sites.desks["ada"].calls == 1


async def test_shares_that_are_refused_leave_no_training(bundles):
    server = Coordinator(bundles)
    entries = await server.check_ins()
    few = entries_to_bytes(entries[name] for name in CLIENTS[:2])
    error = await refused(server.ask("ada", Exchange.SHARE, few), SecureAggregationError)
    assert error.breach is Breach.ROSTER_SIZE
    assert begun(server) == []


async def test_what_the_others_did_not_seal_ends_the_training(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    await refused(server.ask("ada", Exchange.TRAIN, told["bob"]), SecureAggregationError)
    assert begun(server) == []
    await refused(server.ask("ada", Exchange.TRAIN, told["ada"]), RemoteProtocolError, "no training of")
    assert server.outbox("ada") == []


async def test_keys_for_a_later_attempt_end_the_training(bundles):
    server = Coordinator(bundles)
    await server.keyed()
    (training,) = begun(server)
    await server.check_ins(("ada",), at=(1, 1))
    assert begun(server) == [training]
    await server.check_ins(("ada",), at=(1, 2))
    await over(server, training)
    assert begun(server) == []


async def test_an_app_that_fails_is_told_of_with_train(bundles):
    server = Coordinator(bundles)

    def works():
        raise RuntimeError("the app raised")

    server.sites.desks["ada"].works = works
    _, told = await server.keyed()
    with pytest.raises(RuntimeError, match="the app raised"):
        await server.ask("ada", Exchange.TRAIN, told["ada"])
    assert server.outbox("ada") == []


async def test_a_site_without_budget_shares_nothing_and_does_not_train(private):
    server = private(0.01)
    roster = await roster_of(server)
    await refused(server.ask("ada", Exchange.SHARE, roster), PolicyRefusedError, "budget")
    assert server.sites.desks["ada"].calls == 0
    assert begun(server) == []


async def test_nothing_is_charged_when_train_never_comes(private):
    server = private(200.0, "runtime.deadline_s=0.01")
    roster = await roster_of(server)
    gate, accounts = server.sites._gates["ada"], server.sites._accounts["ada"]
    started = []
    server.sites.desks["ada"].works = lambda: started.append((*begun(server), *gate.spent(ACCOUNT)))
    await server.ask("ada", Exchange.SHARE, roster)
    ((training, reserved),) = started
    await over(server, training)
    assert reserved.account == ACCOUNT
    assert begun(server) == []
    assert server.outbox("ada") == []
    assert gate.spent(ACCOUNT) == ()
    assert list(accounts.ledger.charges(ACCOUNT)) == []


async def test_one_training_is_charged_once_with_its_update(private):
    server = private(200.0)
    gate, accounts = server.sites._gates["ada"], server.sites._accounts["ada"]
    _, told = await server.keyed()
    assert len(gate.spent(ACCOUNT)) == 1, "reserved, so that no other run counts on it"
    assert list(accounts.ledger.charges(ACCOUNT)) == []
    await server.said("ada", Exchange.TRAIN, told["ada"])
    await server.said("ada", Exchange.TRAIN, told["ada"])
    assert [release.key.exchange for release in server.sites.releases("ada")] == [TRAIN]
    assert len(list(accounts.ledger.charges(ACCOUNT))) == 1


async def test_a_study_of_its_own_for_train_ends_the_training(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    study = MASKED.with_overrides(["train.lr=0.5"])
    error = await refused(server.ask("ada", Exchange.TRAIN, told["ada"], study=study), SecureAggregationError)
    assert error.breach is Breach.EQUIVOCATION
    assert server.outbox("ada") == []
