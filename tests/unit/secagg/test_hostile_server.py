"""A server that does everything wrong, by name: each attack ends in one named error at an honest client, and opens nothing.

An attack gets a world of four clients (one of them, `site-003`, in the server's pay), brings it to the stage that it wants, changes what the victim
`site-000` is told, and delivers it. The victim must refuse by the expected name and hold no secret afterwards.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fedlearn.release.keys import AttemptId
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import SECRETS, ClientRound, ClientState, Identity
from fedlearn.secagg.graph import Graph, parameters
from fedlearn.secagg.messages import Agreements, Delivery, Reveals, Roster, Survivors
from fedlearn.secagg.plan import Plan, Terms
from fedlearn.secagg.primitives import Suite, derive, new_identity, new_key, seal, sign
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.shamir import PRIME
from tests.support.secagg_world import SUBJECT, World, learnable, malicious, name_of

VICTIM, OTHER, THIRD, CORRUPT = (name_of(i) for i in range(4))
ATTACKS = []


def attack(breach, world=World):
    """Register an attack on a world of four."""

    def add(function):
        ATTACKS.append(pytest.param(function, breach, world, id=function.__name__))
        return function

    return add


@pytest.mark.parametrize(("function", "breach", "make"), ATTACKS)
def test_attack(function, breach, make):
    world = make(4)
    with pytest.raises(SecureAggregationError) as caught:
        function(world)
    assert caught.value.breach is breach
    victim = world.clients[VICTIM]
    if victim.state is not ClientState.OPENED:  # an attack on what is over finds nothing to refuse with
        assert victim.state is ClientState.FAILED
        with pytest.raises(SecureAggregationError):
            victim.receive(world.out[VICTIM])
    assert not [name for name in SECRETS if name in victim.__dict__]


def test_there_are_many_attacks_and_each_state_and_breach_is_attacked():
    assert len(ATTACKS) >= 50
    told = {Breach.MALFORMED, Breach.TOO_LARGE, Breach.BAD_VECTOR, Breach.BAD_RECONSTRUCTION, Breach.BAD_NONCE}
    named = {param.values[1] for param in ATTACKS}
    assert set(Breach) - named <= told | {Breach.UNSAFE_GRAPH, Breach.REPLAY}, "these are attacked below, or by clients"


def tell(world, message):
    """Give the victim this message instead of its own."""
    world.clients[VICTIM].receive(message)


def roster(world, **changes):
    """The honest roster with some members changed; None leaves one out."""
    members = {m.client: m for m in world.rostered().out[VICTIM].members}
    members.update(changes)
    return Roster(tuple(m for m in members.values() if m is not None))


def member(world, name):
    return next(m for m in world.rostered().out[VICTIM].members if m.client == name)


# The roster.


@attack(Breach.NOT_ENROLLED)
def a_sybil_joins_the_roster(world):
    sybil = Identity("site-004", new_identity(world.suite, world.draw("sybil")))
    known = ClientRound(world.terms, sybil, {"site-004": sybil.key.public}, world.draw("sybil"))
    wide = World(4, room=5)
    members = wide.rostered().out[VICTIM].members
    world.clients, world.out = wide.clients, wide.out
    tell(wide, Roster((*members, known.check_in())))


@attack(Breach.BAD_SIGNATURE)
def another_clients_mask_key_is_substituted(world):
    fake = new_key(world.suite, world.draw("fake")).public
    tell(world, roster(world, **{OTHER: replace(member(world, OTHER), mask_key=fake)}))


@attack(Breach.BAD_SIGNATURE)
def another_clients_transport_key_is_substituted(world):
    fake = new_key(world.suite, world.draw("fake")).public
    tell(world, roster(world, **{OTHER: replace(member(world, OTHER), transport_key=fake)}))


@attack(Breach.BAD_SIGNATURE)
def two_clients_keys_are_swapped(world):
    one, two = member(world, OTHER), member(world, THIRD)
    tell(world, roster(world, **{OTHER: replace(two, client=OTHER), THIRD: replace(one, client=THIRD)}))


@attack(Breach.BAD_SIGNATURE)
def a_clients_two_keys_are_swapped(world):
    one = member(world, OTHER)
    tell(world, roster(world, **{OTHER: replace(one, mask_key=one.transport_key, transport_key=one.mask_key)}))


@attack(Breach.BAD_SIGNATURE)
def a_commitment_is_substituted(world):
    tell(world, roster(world, **{OTHER: replace(member(world, OTHER), commitment=bytes(32))}))


@attack(Breach.BAD_SIGNATURE)
def the_server_signs_for_a_client_itself(world):
    fake = replace(member(world, OTHER), mask_key=new_key(world.suite, world.draw("fake")).public)
    own = new_identity(world.suite, world.draw("server"))
    tell(
        world,
        roster(world, **{OTHER: replace(fake, signature=sign(world.suite, own.secret, fake.signed(world.terms)))}),
    )


@attack(Breach.BAD_SIGNATURE)
def a_signature_is_cut(world):
    one = member(world, OTHER)
    tell(world, roster(world, **{OTHER: replace(one, signature=one.signature[:-1])}))


@attack(Breach.SELF_CHANGED)
def the_victims_own_key_is_substituted(world):
    fake = new_key(world.suite, world.draw("fake")).public
    tell(world, roster(world, **{VICTIM: replace(member(world, VICTIM), mask_key=fake)}))


@attack(Breach.SELF_CHANGED)
def the_victims_check_in_of_another_attempt_is_used(world):
    later = World(4, at=AttemptId(1, 2))
    tell(world, roster(world, **{VICTIM: later.clients[VICTIM].check_in()}))


@attack(Breach.SELF_MISSING)
def the_victim_is_left_out(world):
    tell(world, roster(world, **{VICTIM: None}))


@attack(Breach.ROSTER_ORDER)
def a_name_stands_twice(world):
    members = world.rostered().out[VICTIM].members
    tell(world, Roster((members[0], members[1], members[1], members[2])))


@attack(Breach.ROSTER_ORDER)
def the_roster_is_not_in_order(world):
    members = world.rostered().out[VICTIM].members
    tell(world, Roster((members[0], members[2], members[1], members[3])))


@attack(Breach.ROSTER_SIZE)
def only_the_victim_and_an_accomplice_are_left(world):
    tell(world, roster(world, **{OTHER: None, THIRD: None}))


@attack(Breach.ROSTER_SIZE)
def more_clients_than_the_sum_has_room_for(world):
    narrow = World(4, room=4)
    wide = World(5, room=5)
    members = wide.rostered().out[VICTIM].members
    narrow.rostered()
    world.clients, world.out = narrow.clients, narrow.out
    tell(narrow, Roster((*narrow.out[VICTIM].members, members[4])))


@attack(Breach.ROSTER_SIZE)
def an_empty_roster(world):
    world.rostered()
    tell(world, Roster(()))


@attack(Breach.REPEATED_KEY)
def an_accomplice_takes_another_clients_public_key(world):
    taken = replace(member(world, CORRUPT), mask_key=member(world, OTHER).mask_key)
    tell(world, roster(world, **{CORRUPT: world.sign_in(CORRUPT, taken)}))


@attack(Breach.REPEATED_KEY)
def an_accomplice_uses_the_victims_transport_key_as_its_mask_key(world):
    taken = replace(member(world, CORRUPT), mask_key=member(world, VICTIM).transport_key)
    tell(world, roster(world, **{CORRUPT: world.sign_in(CORRUPT, taken)}))


@attack(Breach.REPEATED_KEY)
def one_accomplice_is_enrolled_under_two_names(world):
    world.rostered()
    victim, key = world.clients[VICTIM], world.identities[CORRUPT].key
    victim._trust = {**world.trust, THIRD: key.public}
    twin = replace(member(world, THIRD), mask_key=new_key(world.suite, world.draw("twin")).public)
    tell(
        world,
        roster(world, **{THIRD: replace(twin, signature=sign(world.suite, key.secret, twin.signed(world.terms)))}),
    )


def _low_order(world, field, key):
    weak = replace(member(world, CORRUPT), **{field: key})
    tell(world, roster(world, **{CORRUPT: world.sign_in(CORRUPT, weak)}))


@attack(Breach.BAD_KEY)
def an_accomplices_mask_key_is_zero(world):
    _low_order(world, "mask_key", bytes(32))


@attack(Breach.BAD_KEY)
def an_accomplices_transport_key_is_of_order_eight(world):
    _low_order(
        world, "transport_key", bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157")
    )


@attack(Breach.BAD_KEY)
def an_accomplices_key_is_one_in_another_writing(world):
    _low_order(world, "mask_key", (2**255 - 19 + 1).to_bytes(32, "little"))


@attack(Breach.BAD_KEY)
def an_accomplices_key_is_zero_with_the_unused_bit_set(world):
    _low_order(world, "mask_key", (2**255).to_bytes(32, "little"))


@attack(Breach.BAD_KEY)
def a_key_of_another_suites_length(world):
    _low_order(world, "mask_key", bytes([2]) * 33)


def p256(n):
    return World(n, plan={"suite": Suite.P256_AES256})


@attack(Breach.BAD_KEY, p256)
def a_key_that_is_no_point_of_p256(world):
    _low_order(world, "mask_key", b"\x02" + b"\xff" * 32)


@attack(Breach.BAD_KEY, p256)
def a_curve25519_key_where_p256_is_agreed(world):
    _low_order(world, "transport_key", new_key(Suite.X25519_AES256, world.draw("other")).public)


@attack(Breach.BAD_SIGNATURE, p256)
def a_p256_key_is_substituted(world):
    fake = new_key(world.suite, world.draw("fake")).public
    tell(world, roster(world, **{OTHER: replace(member(world, OTHER), mask_key=fake)}))


@attack(Breach.BAD_SIGNATURE, p256)
def a_p256_inclusion_is_forged(world):
    one, *rest = survivors(world).inclusions
    tell(world, survivors_of(world, inclusions=(one[:-1] + bytes([one[-1] ^ 1]), *rest)))


def _from_other_terms(world, **changes):
    other = replace(world.terms, **changes)
    tell(world, roster(world, **{OTHER: world.sign_in(OTHER, member(world, OTHER), other)}))


@attack(Breach.BAD_SIGNATURE)
def a_check_in_of_an_earlier_round_is_replayed(world):
    _from_other_terms(world, at=AttemptId(0, 1))


@attack(Breach.BAD_SIGNATURE)
def a_check_in_of_another_attempt_is_replayed(world):
    _from_other_terms(world, at=AttemptId(1, 2))


@attack(Breach.BAD_SIGNATURE)
def a_check_in_of_another_run_is_replayed(world):
    _from_other_terms(world, run="other run")


@attack(Breach.BAD_SIGNATURE)
def another_client_is_made_to_expect_fewer_adversaries(world):
    _from_other_terms(world, plan=replace(world.plan, adversarial=0.0))


@attack(Breach.BAD_SIGNATURE)
def another_client_is_made_to_hold_another_encoding(world):
    _from_other_terms(world, plan=replace(world.plan, encoding=Encoding(7, 4, 2.0)))


@attack(Breach.BAD_SIGNATURE)
def another_client_is_made_to_use_another_suite(world):
    _from_other_terms(world, plan=replace(world.plan, suite=Suite.X25519_CHACHA20))


@attack(Breach.BAD_SIGNATURE)
def another_client_is_made_to_hold_another_privacy_plan(world):
    _from_other_terms(world, plan=replace(world.plan, privacy=b"weaker"))


@attack(Breach.EQUIVOCATION)
def two_rosters(world):
    honest = roster(world)
    tell(world, honest)
    tell(world, Roster(honest.members[:3]))


# Shares.


@attack(Breach.BAD_SHARE)
def the_roster_is_split(world):
    world.rostered()
    # Three of four each: the victim and the others see two rosters that are both good.
    halves = {VICTIM: [0, 1, 2], OTHER: [0, 1, 3], THIRD: [0, 2, 3]}
    members = world.out[VICTIM].members
    sent = {name: world.clients[name].receive(Roster(tuple(members[i] for i in h))) for name, h in halves.items()}
    tell(world, Delivery(0b111, (sent[OTHER].sealed[0], sent[THIRD].sealed[0])))


@attack(Breach.BAD_SHARE)
def clients_are_given_different_models(world):
    for name, client in world.clients.items():
        client.bind(b"another model" if name == OTHER else SUBJECT)
        world.server.receive(name, client.check_in())
    world.out = world.server.close()
    tell(world.step(), world.out[VICTIM])


def delivery(world, **changes):
    world.delivered()
    return replace(world.out[VICTIM], **changes)


@attack(Breach.BAD_SHARE)
def a_ciphertext_is_altered(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=(sealed[0][:-1] + bytes([sealed[0][-1] ^ 1]), *sealed[1:])))


def delivery_of(world, **changes):
    return replace(world.out[VICTIM], **changes)


@attack(Breach.BAD_SHARE)
def two_senders_are_swapped(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=(sealed[1], sealed[0], sealed[2])))


@attack(Breach.BAD_SHARE)
def a_ciphertext_for_another_receiver_is_delivered(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=(world.out[THIRD].sealed[1], *sealed[1:])))


@attack(Breach.BAD_SHARE)
def the_victims_own_ciphertext_is_reflected(world):
    world.rostered()
    sent = {name: client.receive(world.out[name]) for name, client in world.clients.items()}
    tell(world, Delivery(0b1111, (sent[VICTIM].sealed[0], sent[THIRD].sealed[0], sent[CORRUPT].sealed[0])))


@attack(Breach.BAD_SHARE)
def a_ciphertext_of_an_earlier_round_is_replayed(world):
    earlier = World(4, at=AttemptId(0, 1)).delivered()
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=(earlier.out[VICTIM].sealed[0], *sealed[1:])))


@attack(Breach.BAD_SHARE)
def an_accomplices_share_is_no_field_element(world):
    sealed = delivery(world).sealed
    victim, accomplice = world.clients[VICTIM], world.clients[CORRUPT]
    t, shared = accomplice._transcript, victim._channels[3]
    both = PRIME.to_bytes(33, "big") + bytes(33)
    fake = seal(derive(shared, t.share_key(3, 0)), both, t.share_data(3, 0))
    tell(world, delivery_of(world, sealed=(*sealed[:2], fake)))


@attack(Breach.MALFORMED)
def a_ciphertext_is_withheld_without_saying_so(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=sealed[:2]))


@attack(Breach.MALFORMED)
def a_ciphertext_too_many(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sealed=(*sealed, sealed[0])))


@attack(Breach.SELF_MISSING)
def the_victim_is_told_that_it_did_not_share(world):
    tell(world, delivery(world, sharers=0b1110))


@attack(Breach.WRONG_SET)
def somebody_shared_who_is_not_on_the_roster(world):
    tell(world, delivery(world, sharers=0b11111))


@attack(Breach.BELOW_THRESHOLD)
def only_an_accomplice_shared(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sharers=0b1001, sealed=sealed[2:]))


@attack(Breach.BELOW_THRESHOLD, lambda n: World(n, plan={"minimum": 4}))
def fewer_sharers_than_the_plans_minimum(world):
    sealed = delivery(world).sealed
    tell(world, delivery_of(world, sharers=0b0111, sealed=sealed[:2]))


@attack(Breach.EQUIVOCATION)
def two_deliveries(world):
    sealed = delivery(world).sealed
    tell(world, world.out[VICTIM])
    tell(world, Delivery(0b0111, sealed[:2]))


@attack(Breach.UNEXPECTED)
def shares_before_the_roster(world):
    world.rostered()
    tell(world, Delivery(0b1111, (bytes(82),) * 3))


@attack(Breach.UNEXPECTED)
def nonces_in_a_complete_graph(world):
    world.rostered()
    tell(world, world.out[VICTIM])
    tell(world, Reveals((bytes(32),) * 4))


# Opening.


def survivors(world, **changes):
    world.masked()
    return replace(world.out[VICTIM], **changes)


@attack(Breach.SELF_MISSING)
def the_victim_is_told_that_it_is_dead(world):
    tell(world, survivors(world, survivors=0b1110))


@attack(Breach.WRONG_SET)
def somebody_survives_who_did_not_share(world):
    world.rostered()
    del world.clients[CORRUPT], world.out[CORRUPT]
    for name, message in world.out.items():
        world.server.receive(name, world.clients[name].receive(message))
    world.out = world.server.close()
    tell(world.step(), replace(world.out[VICTIM], survivors=0b1111))


@attack(Breach.WRONG_SET)
def somebody_survives_who_is_not_on_the_roster(world):
    tell(world, survivors(world, survivors=0b11111))


@attack(Breach.BELOW_THRESHOLD)
def the_threshold_is_lowered(world):
    world.masked()
    tell(world, Survivors(0b1001, world.out[VICTIM].inclusions[2:]))


@attack(Breach.BELOW_THRESHOLD)
def the_victim_is_to_open_its_own_vector_alone(world):
    world.masked()
    tell(world, Survivors(0b0001, ()))


@attack(Breach.BELOW_THRESHOLD, lambda n: World(n, plan={"minimum": 4}))
def a_sum_over_fewer_than_the_plans_minimum(world):
    world.masked()
    tell(world, Survivors(0b0111, world.out[VICTIM].inclusions[:2]))


@attack(Breach.BAD_SIGNATURE)
def an_inclusion_is_forged(world):
    world.masked()
    tell(world, survivors_of(world, inclusions=(bytes(64), *world.out[VICTIM].inclusions[1:])))


def survivors_of(world, **changes):
    return replace(world.out[VICTIM], **changes)


@attack(Breach.BAD_SIGNATURE)
def inclusions_are_swapped(world):
    one, two, three = survivors(world).inclusions
    tell(world, survivors_of(world, inclusions=(two, one, three)))


@attack(Breach.BAD_SIGNATURE)
def another_client_was_told_of_fewer_sharers(world):
    # Selective delivery: `site-001` masks its vector with two others only, who can then be declared dead.
    world.delivered()
    honest = world.out[OTHER]
    world.out[OTHER] = Delivery(0b1110, honest.sealed[1:])
    sent = {name: world.answer(name, message) for name, message in world.out.items()}
    tell(world, Survivors(0b1111, tuple(sent[name].signature for name in (OTHER, THIRD, CORRUPT))))


@attack(Breach.MALFORMED)
def an_inclusion_is_missing(world):
    tell(world, survivors_of(world.masked(), inclusions=world.out[VICTIM].inclusions[:2]))


@attack(Breach.BAD_SIGNATURE)
def an_inclusion_of_an_earlier_round_is_replayed(world):
    earlier = World(4, at=AttemptId(0, 1)).masked()
    tell(world, survivors(world, inclusions=earlier.out[VICTIM].inclusions))


@attack(Breach.EQUIVOCATION)
def two_unmask_requests(world):
    world.masked()
    tell(world, world.out[VICTIM])
    try:
        tell(world, Survivors(0b0111, world.out[VICTIM].inclusions[:2]))
    finally:
        assert world.clients[VICTIM].state is ClientState.FAILED


@attack(Breach.UNEXPECTED)
def an_unmask_request_before_the_vector(world):
    world.delivered()
    tell(world, world.out[VICTIM])
    tell(world, Survivors(0b1111, (bytes(64),) * 3))


@attack(Breach.UNEXPECTED)
def agreements_without_a_question(world):
    world.masked()
    tell(world, Agreements(0b1111, (bytes(64),) * 4))


# The malicious profile.


@attack(Breach.BELOW_THRESHOLD, malicious)
def too_few_agree(world):
    signatures = world.agreed().out[VICTIM].signatures
    tell(world, Agreements(0b0011, signatures[:2]))


@attack(Breach.BAD_SIGNATURE, malicious)
def survivors_are_split(world):
    # The victim is told of four survivors, the others of three; their signatures do not fit what the victim agreed to.
    world.masked()
    sent = {}
    for name in (OTHER, THIRD, CORRUPT):
        honest = world.out[name].inclusions
        sent[name] = world.clients[name].receive(Survivors(0b1110, honest[1:])).signature
    own = world.clients[VICTIM].receive(world.out[VICTIM]).signature
    tell(world, Agreements(0b1111, (own, sent[OTHER], sent[THIRD], sent[CORRUPT])))


@attack(Breach.BAD_SIGNATURE, malicious)
def an_agreement_is_forged(world):
    signatures = world.agreed().out[VICTIM].signatures
    tell(world, Agreements(0b1111, (signatures[0], bytes(64), *signatures[2:])))


@attack(Breach.BAD_SIGNATURE, malicious)
def one_clients_agreement_is_counted_for_another(world):
    signatures = world.agreed().out[VICTIM].signatures
    tell(world, Agreements(0b0111, (signatures[0], signatures[1], signatures[1])))


@attack(Breach.MALFORMED, malicious)
def more_signatures_than_signers(world):
    signatures = world.agreed().out[VICTIM].signatures
    tell(world, Agreements(0b0111, signatures))


@attack(Breach.WRONG_SET, malicious)
def somebody_agrees_who_is_no_survivor(world):
    signatures = world.agreed().out[VICTIM].signatures
    tell(world, Agreements(0b11111, (*signatures, signatures[0])))


@attack(Breach.EQUIVOCATION, malicious)
def two_sets_of_survivors_to_agree_to(world):
    world.masked()
    tell(world, world.out[VICTIM])
    tell(world, Survivors(0b0111, world.out[VICTIM].inclusions[:2]))


# Attacks that need no wrong message, or none that this client can see.


@pytest.mark.parametrize("at", [AttemptId(3, 1), AttemptId(3, 2), AttemptId(2, 9)])
def test_a_round_that_is_not_later_is_refused(at):
    world = World(4)
    identity = world.identities[VICTIM]
    with pytest.raises(SecureAggregationError) as caught:
        ClientRound(Terms("run", at, world.plan), identity, world.trust, world.draw("x"), after=AttemptId(3, 2))
    assert caught.value.breach is Breach.REPLAY


def test_a_roster_for_which_no_threshold_is_safe_is_refused():
    # Room for 100, where half may drop out, but a roster of four: losing two of four would open it to an adversary.
    plan = Plan(Encoding(7, 100, 1.0), adversarial=0.0, dropout=0.49)
    world = World(4, room=100, plan={"adversarial": 0.0, "dropout": 0.49})
    assert plan.parameters(100).threshold == 51
    for name, client in world.clients.items():
        client.bind(SUBJECT)
        if name != VICTIM:
            client.check_in()
    own = world.clients[VICTIM].check_in()
    members = (own, *(client._own for name, client in world.clients.items() if name != VICTIM))
    world.clients[VICTIM].receive(Roster(members))  # one of four may drop out, and must not
    small = World(3, room=100, plan={"adversarial": 0.0, "dropout": 0.34})
    for client in small.clients.values():
        client.bind(SUBJECT)
        client.check_in()
    with pytest.raises(SecureAggregationError) as caught:
        tell(small, Roster(tuple(client._own for client in small.clients.values())))
    assert caught.value.breach is Breach.UNSAFE_GRAPH


def openings(world, told):
    """Ask every client to open what `told` says; who refuses is left out.

    Returns:
        For each client that opened, the survivors that it was told; and the refusals.
    """
    given, refused = {}, {}
    for i, (name, alive) in enumerate(told.items()):
        honest = dict(zip([j for j in range(len(told)) if j != i], world.out[name].inclusions, strict=True))
        message = Survivors(alive, tuple(s for j, s in sorted(honest.items()) if alive >> j & 1))
        try:
            world.clients[name].receive(message)
            given[i] = alive
        except SecureAggregationError as error:
            refused[i] = error.breach
    return given, refused


@pytest.mark.parametrize("n", [4, 5, 7, 10])
def test_a_client_that_is_alive_to_some_and_dead_to_others_gives_only_one_of_its_masks(n):
    world = World(n).masked()
    everybody = (1 << n) - 1
    for half in range(1, n):
        told = {name_of(i): everybody if i == 0 or i < half else everybody & ~1 for i in range(n)}
        given, refused = openings(World(n).masked() if half > 1 else world, told)
        sums = learnable(Graph(world.plan.parameters(n)), everybody, given, corrupt=0)
        assert not refused
        assert all(len(one) >= 2 for one in sums)


@pytest.mark.parametrize(("n", "fewest"), [(3, 2), (4, 2), (5, 3)])
def test_no_way_of_telling_survivors_opens_one_client_alone(n, fewest):
    """Every way of telling each honest client a set that it accepts, with and without an accomplice, by counting."""
    found, everybody, sizes = parameters(n, 100_000, 0), (1 << n) - 1, []
    legal = [[s for s in range(1 << n) if s >> i & 1 and s.bit_count() >= found.threshold] for i in range(n)]
    for corrupt in (0, *(1 << i for i in range(n))):
        honest = [i for i in range(n) if not corrupt >> i & 1]
        for told in itertools.product(*(legal[i] for i in honest)):
            sums = learnable(Graph(found), everybody, dict(zip(honest, told, strict=True)), corrupt)
            sizes += map(len, sums)
    assert min(sizes) == fewest
    assert max(sizes) == n


def test_the_malicious_profile_opens_one_set_or_nothing():
    world = malicious(5).masked()
    everybody = 0b11111
    told = {name_of(i): everybody & ~(1 << (i + 1) % 5) if i % 2 else everybody for i in range(5)}
    signed = {}
    for i, (name, alive) in enumerate(told.items()):
        honest = dict(zip([j for j in range(5) if j != i], world.out[name].inclusions, strict=True))
        message = Survivors(alive, tuple(s for j, s in sorted(honest.items()) if alive >> j & 1))
        signed[i] = world.clients[name].receive(message).signature
    for i, name in enumerate(told):
        agreeing = [j for j in range(5) if told[name_of(j)] == told[name]]
        message = Agreements(sum(1 << j for j in agreeing), tuple(signed[j] for j in agreeing))
        with pytest.raises(SecureAggregationError) as caught:
            world.clients[name].receive(message)
        assert caught.value.breach is Breach.BELOW_THRESHOLD
        assert i in agreeing


def test_what_the_server_sees_of_one_client_is_uniform():
    """The same update under fresh keys, many times: the masked coordinate has no favourite value."""
    counts = [0] * 16
    for i in range(150):
        world = World(3, seed=f"uniform {i}", ring_bits=16).delivered()
        vector = world.answer(VICTIM, world.out[VICTIM]).vector
        for low in range(0, len(vector), 2):
            counts[vector[low + 1] >> 4] += 1
    expected = sum(counts) / 16
    assert sum((c - expected) ** 2 / expected for c in counts) < 44.3, "99.99th percentile, 15 degrees"


def test_the_same_message_again_gets_the_same_answer_at_every_stage():
    world = malicious(4).rostered()
    for _ in range(4):
        first = {name: world.clients[name].receive(message) for name, message in world.out.items()}
        again = {name: world.clients[name].receive(message) for name, message in world.out.items()}
        assert first == again
        for name, reply in first.items():
            world.server.receive(name, reply or world.clients[name].mask(world.vectors[name].copy()))
        world.out = world.server.close()
    assert [*world.server.total.integers.tolist()] == world.expected(world.clients)[:-1]
