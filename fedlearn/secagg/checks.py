"""What a client checks of the server's messages. Each check is one function that raises by name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from fedlearn.errors import UnsupportedError
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import PPM, Graph, members_of
from fedlearn.secagg.messages import Reveals, Roster, Survivors
from fedlearn.secagg.plan import CheckIn, Plan, Terms, nonce_commitment
from fedlearn.secagg.primitives import Suite, check_public, verified


def roster(message: Roster, terms: Terms, trust: Mapping[str, bytes], own: CheckIn) -> tuple[bytes, ...]:
    """Enrolled, signed for these terms, in order, no key twice, not too few, not too many; this client once, as it checked in.

    Returns:
        The members' identity keys, in order.

    Raises:
        SecureAggregationError: by what is wrong.
    """
    members, plan = message.members, terms.plan
    if not plan.minimum <= len(members) <= plan.encoding.clients:
        raise SecureAggregationError(
            Breach.ROSTER_SIZE, f"got a roster of {len(members)}, expected {plan.minimum} to {plan.encoding.clients}"
        )
    if any(one.client >= other.client for one, other in pairwise(members)):
        raise SecureAggregationError(Breach.ROSTER_ORDER, "got a roster that is not sorted, or names a client twice")
    mine = [member for member in members if member.client == own.client]
    if not mine:
        raise SecureAggregationError(Breach.SELF_MISSING, f"{own.client!r} is not on the roster")
    if mine != [own]:
        raise SecureAggregationError(Breach.SELF_CHANGED, f"the keys of {own.client!r} on the roster are not its own")
    try:
        plan.parameters(len(members))
    except UnsupportedError as error:
        raise SecureAggregationError(Breach.UNSAFE_GRAPH, error.message) from None
    identities = tuple(check_in(member, terms, trust) for member in members)
    keys = [key for member in members for key in (member.mask_key, member.transport_key)]
    if len(set(keys)) < len(keys) or len(set(identities)) < len(identities):
        raise SecureAggregationError(Breach.REPEATED_KEY, "got a roster on which a public key stands twice")
    return identities


def check_in(member: CheckIn, terms: Terms, trust: Mapping[str, bytes]) -> bytes:
    """One check-in by itself: enrolled, good keys, signed for these terms.

    Returns:
        The member's identity key.

    Raises:
        SecureAggregationError: NOT_ENROLLED, BAD_KEY or BAD_SIGNATURE.
    """
    identity = trust.get(member.client)
    if identity is None:
        raise SecureAggregationError(
            Breach.NOT_ENROLLED, f"{member.client!r} has no enrolled identity here", culprits=(member.client,)
        )
    for key in (member.mask_key, member.transport_key):
        check_public(terms.plan.suite, key)
    signature(terms.plan.suite, identity, member.signature, member.signed(terms), member.client)
    return identity


def reveals(message: Reveals, members: tuple[CheckIn, ...], plan: Plan) -> int:
    """Each nonce is what its owner committed to; no more are withheld than may drop out.

    Returns:
        The set of members whose nonces are there.
    """
    count(len(message.nonces), len(members), "nonces")
    revealed = 0
    for index, (member, nonce) in enumerate(zip(members, message.nonces, strict=True)):
        if not nonce:
            continue
        if nonce_commitment(member.client, nonce) != member.commitment:
            raise SecureAggregationError(
                Breach.BAD_NONCE, f"the nonce of {member.client!r} is not what it committed to"
            )
        revealed |= 1 << index
    withheld, allowed = len(members) - revealed.bit_count(), len(members) * round(plan.dropout * PPM) // PPM
    if withheld > allowed:
        raise SecureAggregationError(Breach.BAD_NONCE, f"{withheld} nonces are withheld, expected at most {allowed}")
    return revealed


def survivors(message: Survivors, sharers: int, me: int, graph: Graph, plan: Plan) -> None:
    """Sharers only, this client among them, enough in all and around each whose mask would be opened; a signature of each."""
    alive = message.survivors
    within(alive, sharers, "survivors")
    has(alive, me, "survivors")
    enough(alive.bit_count(), plan.minimum, "survivors")
    around = [me, *members_of(alive & graph.holder_set(me))]
    for j in around[:1] if graph.parameters.complete else around:  # in a complete graph all have the same holders
        enough((alive & graph.holder_set(j)).bit_count(), graph.threshold, "survivors around a client")
    neighbours = (alive & graph.holder_set(me) & ~(1 << me)).bit_count()
    count(len(message.inclusions), neighbours, "inclusion signatures")


def signature(suite: Suite, identity: bytes, given: bytes, message: bytes, client: str) -> None:
    """It verifies under the client's identity."""
    if not verified(suite, identity, given, message):
        raise SecureAggregationError(
            Breach.BAD_SIGNATURE, f"a signature of {client!r} does not verify", culprits=(client,)
        )


def within(members: int, allowed: int, what: str) -> None:
    """A set lies in another."""
    if members & ~allowed:
        extra = (members & ~allowed).bit_count()
        raise SecureAggregationError(Breach.WRONG_SET, f"got {extra} {what} that cannot be")


def has(members: int, me: int, what: str) -> None:
    """This client is in the set."""
    if not members >> me & 1:
        raise SecureAggregationError(Breach.SELF_MISSING, f"this client is not among the {what}")


def enough(got: int, least: int, what: str) -> None:
    """Not below a threshold."""
    if got < least:
        raise SecureAggregationError(Breach.BELOW_THRESHOLD, f"got {got} {what}, expected at least {least}")


def count(got: int, expected: int, what: str) -> None:
    """Exactly as many as there must be."""
    if got != expected:
        raise SecureAggregationError(Breach.MALFORMED, f"got {got} {what}, expected {expected}")
