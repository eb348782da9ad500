"""A hostile coordinator against real agents: policy, gate, keys and the worker's code. Each attack ends in a named error, and nothing leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.policy import SiteRules
from fedlearn.errors import FedlearnError, PolicyRefusedError, RemoteProtocolError, UpdateError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MESSAGE_TYPES, decode_facts, decode_said, encode_update
from fedlearn.learning.update import Update
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.enrolment import ENTRIES_LIMIT_BYTES, entries_to_bytes
from fedlearn.secagg.hooks import from_client
from fedlearn.secagg.messages import Agreements, Delivery, Roster, Survivors, from_bytes, to_bytes
from fedlearn.secagg.server import Stage
from tests.support.hostile_coordinator import LENGTH, MASKED, MODEL, Coordinator
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

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


def entries_of(found, **changed):
    """The roster of these check-ins, some of them replaced."""
    entries = {**found, **changed}
    return entries_to_bytes(entries[name] for name in sorted(entries))


async def two_of_four(server):
    found = await server.check_ins()
    return entries_of({name: found[name] for name in ("ada", "bob")})


async def another_run(server):
    await server.check_ins()
    others = await server.check_ins(CLIENTS[1:], run=f"{server.run}-other")
    return entries_of(await server.check_ins(), **others)


async def the_next_round(server):
    return entries_of(await server.check_ins(), **await server.check_ins(CLIENTS[1:], at=(2, 1)))


async def another_attempt(server):
    return entries_of(await server.check_ins(), **await server.check_ins(CLIENTS[1:], at=(1, 2)))


async def another_length(server):
    return entries_of(await server.check_ins(("ada",)), **await server.check_ins(CLIENTS[1:], length=LENGTH + 1))


async def swapped_keys(server):
    found = await server.check_ins()
    bob, cyd = found["bob"].check_in, found["cyd"].check_in
    one = replace(bob, mask_key=cyd.mask_key, transport_key=cyd.transport_key)
    return entries_of(found, bob=replace(found["bob"], check_in=one))


async def a_renamed_check_in(server):
    found = await server.check_ins(CLIENTS[:3])
    return entries_of(found, dee=replace(found["cyd"], check_in=replace(found["cyd"].check_in, client="dee")))


async def a_borrowed_certificate(server):
    found = await server.check_ins()
    return entries_of(found, dee=replace(found["dee"], claim=found["cyd"].claim))


async def no_certificate(server):
    found = await server.check_ins()
    return entries_of(found, dee=replace(found["dee"], claim=found["dee"].check_in.mask_key))


async def without_the_site_itself(server):
    found = await server.check_ins()
    return entries_of({name: found[name] for name in CLIENTS[1:]})


async def keys_that_the_site_forgot(server):
    found = await server.check_ins()
    server.sites.kill("ada")
    return entries_of(found)


async def too_many_names(server):
    (entry,) = (await server.check_ins(("ada",))).values()
    return entries_to_bytes([entry] * 10_001)


async def too_many_bytes(_server):
    return bytes(ENTRIES_LIMIT_BYTES + 1)


ROSTERS = {
    two_of_four: Breach.ROSTER_SIZE,
    another_run: Breach.BAD_SIGNATURE,
    the_next_round: Breach.BAD_SIGNATURE,
    another_attempt: Breach.BAD_SIGNATURE,
    another_length: Breach.BAD_SIGNATURE,
    swapped_keys: Breach.BAD_SIGNATURE,
    a_renamed_check_in: Breach.NOT_ENROLLED,
    a_borrowed_certificate: Breach.NOT_ENROLLED,
    no_certificate: Breach.NOT_ENROLLED,
    without_the_site_itself: Breach.SELF_MISSING,
    keys_that_the_site_forgot: Breach.SELF_CHANGED,
    too_many_names: Breach.TOO_LARGE,
    too_many_bytes: Breach.TOO_LARGE,
}


@pytest.mark.parametrize(("make", "breach"), ROSTERS.items(), ids=lambda one: getattr(one, "__name__", ""))
async def test_a_roster_that_is_none_gets_no_shares(bundles, make, breach):
    server = Coordinator(bundles)
    error = await refused(server.ask("ada", Exchange.SHARE, await make(server)), SecureAggregationError)
    assert error.breach is breach


OTHER_PLANS = [
    "secure_aggregation.max_clients=5",
    "secure_aggregation.adversarial=0.3",
    "secure_aggregation.dropout=0.2",
    "secure_aggregation.max_examples=21",
    "secure_aggregation.clip_l2=1000.0",
]
OTHER_WORK = ["train.lr=0.5", "rounds=4"]


@pytest.mark.parametrize("other", [*OTHER_PLANS, *OTHER_WORK])
async def test_keys_for_one_study_and_an_update_for_another(bundles, other):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    study = MASKED.with_overrides([other])
    error = await refused(server.ask("ada", Exchange.TRAIN, told["ada"], study=study), SecureAggregationError)
    assert error.breach is Breach.EQUIVOCATION
    assert server.outbox("ada") == []


@pytest.mark.parametrize("other", OTHER_PLANS)
async def test_a_plan_of_its_own_for_one_site(bundles, other):
    study = MASKED.with_overrides([other])
    server = Coordinator(bundles)
    found = {**await server.check_ins(("ada",), study=study), **await server.check_ins(CLIENTS[1:])}
    asked = server.ask("ada", Exchange.SHARE, entries_of(found), study=study)
    assert (await refused(asked, SecureAggregationError)).breach is Breach.BAD_SIGNATURE


@pytest.mark.parametrize("other", OTHER_WORK)
async def test_work_of_its_own_for_one_site(bundles, other):
    """What is no part of the plan is part of what the keys are bound to: the others' shares do not open."""
    study = MASKED.with_overrides([other])
    server = Coordinator(bundles)
    roster = entries_of(await server.check_ins())
    await server.said("ada", Exchange.SHARE, roster, study=study)
    shares = [from_client((await server.said(name, Exchange.SHARE, roster)).body) for name in CLIENTS[1:]]
    delivery = to_bytes(Delivery(0b1111, tuple(one.sealed[0] for one in shares)))
    error = await refused(server.ask("ada", Exchange.TRAIN, delivery, study=study), SecureAggregationError)
    assert error.breach is Breach.BAD_SHARE
    assert server.outbox("ada") == []


async def test_a_delivery_of_another_run_or_attempt(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    _, other = await server.keyed(run=f"{server.run}-other")
    await refused(server.ask("ada", Exchange.TRAIN, told["ada"], at=(1, 2)), RemoteProtocolError, "no training")
    server = Coordinator(bundles)
    await server.keyed()
    error = await refused(server.ask("ada", Exchange.TRAIN, other["ada"]), SecureAggregationError)
    assert error.breach is Breach.BAD_SHARE
    assert server.outbox("ada") == []


async def test_runs_side_by_side_have_keys_of_their_own(bundles):
    server = Coordinator(bundles)
    runs = [server.run, f"{server.run}-other"]
    keyed = {run: await server.keyed(run=run) for run in runs}
    sent = {run: (await server.said("ada", Exchange.TRAIN, keyed[run][1]["ada"], run=run)).body for run in runs}
    one, other = (np.frombuffer(from_client(body).vector, dtype=np.uint32) for body in sent.values())
    assert not (one == other).any()


async def test_a_site_asked_about_too_many_runs_has_dropped_out_of_the_first(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    for number in range(16):
        await server.check_ins(("ada",), run=f"{server.run}-{number}")
    error = await refused(server.ask("ada", Exchange.TRAIN, told["ada"]), SecureAggregationError)
    assert error.breach is Breach.UNEXPECTED


async def test_a_restart_opens_nothing_twice(bundles):
    """What a site remembers in memory alone is gone: the gate has what counts."""
    server = Coordinator(bundles)
    _, told = await server.trained()
    first = await server.said("ada", Exchange.UNMASK, told["ada"])
    server.sites.kill("ada")
    survivors = from_bytes(told["ada"])
    fewer = to_bytes(Survivors(0b0111, survivors.inclusions[:-1]))
    await refused(server.ask("ada", Exchange.UNMASK, fewer), PolicyRefusedError, "other-request")
    assert (await server.said("ada", Exchange.UNMASK, told["ada"])).body == first.body


async def test_a_restart_before_the_opening_opens_nothing(bundles):
    """The same attempt again, with fresh keys: the old vector is sent again, and neither old nor new keys are opened."""
    server = Coordinator(bundles)
    _, told = await server.keyed()
    sent = await server.said("ada", Exchange.TRAIN, told["ada"])
    server.sites.kill("ada")
    await refused(server.ask("ada", Exchange.UNMASK, told["ada"]), SecureAggregationError, "holds no keys")
    for name in CLIENTS:
        server.sites.kill(name)
    made, again = await server.keyed()
    for name in CLIENTS[1:]:
        made.receive(name, from_client((await server.said(name, Exchange.TRAIN, again[name])).body))
    assert (await server.said("ada", Exchange.TRAIN, again["ada"])).body == sent.body
    asked = to_bytes(made.close()["bob"])
    for body in (asked, again["ada"]):
        await refused(server.ask("ada", Exchange.UNMASK, body), SecureAggregationError)
    assert server.outbox("ada") == ["train"]


async def test_two_sets_of_survivors(bundles):
    server = Coordinator(bundles)
    _, told = await server.trained()
    survivors = from_bytes(told["ada"])
    await server.ask("ada", Exchange.UNMASK, told["ada"])
    for fewer in (0b0111, 0b1011, 0b1101):
        body = to_bytes(Survivors(fewer, survivors.inclusions[:-1]))
        await refused(server.ask("ada", Exchange.UNMASK, body), PolicyRefusedError, "other-request")
    digest = "0" * 64
    await refused(server.ask("ada", Exchange.UNMASK, told["ada"], model_digest=digest), PolicyRefusedError, "other-mod")
    await refused(server.ask("ada", Exchange.TRAIN, told["ada"], at=(1, 2)), PolicyRefusedError, "opened")


async def test_a_plain_study_under_the_name_of_a_masked_run(bundles):
    """A site that insists on masks gives nothing plain, whatever the run was before."""
    server = Coordinator(bundles, rules=SiteRules(tasks=(NAME,), secure_aggregation=True))
    await server.trained()
    for at in ((1, 1), (1, 2), (2, 1)):
        await refused(server.ask("ada", Exchange.TRAIN, at=at, study=PLAIN), PolicyRefusedError, "under masks only")
    assert server.outbox("ada") == ["train"]


def worker_says(value, examples):
    """An update that no honest worker makes."""
    arrays = {name: np.full_like(array, value) for name, array in MODEL.items()}
    return encode_update(Update({"delta": arrays}, examples=examples, facts={"loss": 0.25}))


async def test_what_a_worker_lies_about_is_clipped_and_capped_by_its_agent(bundles):
    server = Coordinator(bundles)
    made, told = await server.keyed()
    for name in CLIENTS:
        masks = server.sites._sites[name]._masking.of(MASKED)
        request = replace(decode_facts(server.message(name, Exchange.TRAIN, told[name]).content), model=MODEL)
        for broken in (worker_says(np.nan, 5), worker_says(np.inf, 5), worker_says(1.0, 0), worker_says(1.0, -3)):
            with pytest.raises(UpdateError):
                masks.masked(request, broken)
        body = masks.masked(request, worker_says(1e30, 10**9))
        made.receive(name, from_client(decode_said(name, body).body))
    for name, message in made.close().items():
        session = server.sites._sites[name]._masking.session(server.run)
        made.receive(name, from_client(session.open(AttemptId(1, 1), to_bytes(message))))
    made.close()
    encoding = made.total.encoding
    assert made.total.weight == len(CLIENTS) * encoding.weight_cap
    assert float(np.linalg.norm(made.total.integers)) <= len(CLIENTS) * encoding.norm_bound


async def test_an_error_does_not_say_how_many_examples_there_are(bundles):
    server = Coordinator(bundles)
    _, told = await server.keyed()
    masks = server.sites._sites["ada"]._masking.of(MASKED)
    request = replace(decode_facts(server.message("ada", Exchange.TRAIN, told["ada"]).content), model=MODEL)
    for other in (encode_update(Update({"other": {}}, examples=4321)), worker_says(1.0, -4321)):
        with pytest.raises(UpdateError) as caught:
            masks.masked(request, other)
        assert "4321" not in str(caught.value)


AGREED = MASKED.with_overrides(["secure_aggregation.profile=malicious"])


async def test_survivors_that_nobody_signed_open_nothing(bundles):
    """Where survivors are agreed upon, one set is signed for, ever, and only a quorum's signatures under it open the sum."""
    server = Coordinator(bundles, AGREED)
    made, told = await server.trained()
    first = from_bytes(told["ada"])
    await refused(server.ask("ada", Exchange.AGREE, to_bytes(Agreements(7, (b"x",) * 3))), SecureAggregationError)
    await refused(server.ask("bob", Exchange.UNMASK, told["bob"]), SecureAggregationError, "expected Agreements")
    signed = {name: from_client((await server.said(name, Exchange.AGREE, told[name])).body) for name in CLIENTS[1:]}
    fewer = to_bytes(Survivors(0b0111, first.inclusions[:-1]))
    await refused(server.ask("bob", Exchange.AGREE, fewer), PolicyRefusedError, "other-request")
    two = to_bytes(Agreements(0b0110, (signed["bob"].signature, signed["cyd"].signature)))
    error = await refused(server.ask("bob", Exchange.UNMASK, two), SecureAggregationError)
    assert error.breach is Breach.BELOW_THRESHOLD
    forged = to_bytes(Agreements(0b0111, (signed["cyd"].signature, signed["bob"].signature, signed["cyd"].signature)))
    error = await refused(server.ask("cyd", Exchange.UNMASK, forged), SecureAggregationError)
    assert error.breach is Breach.BAD_SIGNATURE
    server.sites.kill("dee")
    await refused(server.ask("dee", Exchange.AGREE, fewer), PolicyRefusedError, "other-request")
    assert made.stage is Stage.AGREE
    assert all("unmask" not in server.outbox(name) for name in CLIENTS)
