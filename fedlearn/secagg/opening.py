"""Opening a sum: from the clients' shares to the keys of the masks that are left in it, each checked against a promise.

A survivor's own mask is left in the sum, and the pairwise masks between each survivor and each client that shared keys but sent no vector. A seed must fit
the commitment that its owner made, a key the public key on the roster; where false shares are among the true ones, other subsets are
tried, and who gave the false ones is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import Graph, members_of
from fedlearn.secagg.masks import apply_masks
from fedlearn.secagg.plan import CheckIn, Transcript
from fedlearn.secagg.primitives import Suite, agreement, derive, key_of_secret
from fedlearn.secagg.ring import Vector
from fedlearn.secagg.shamir import check_share, combine, liars, subsets
from fedlearn.secagg.surplus import anchor_of


@dataclass(frozen=True)
class Attempted:
    """What stands when the survivors do.

    Args:
        suite: primitives.
        members: the roster, in order.
        graph: the graph.
        transcript: the transcript.
        sharers: who shared keys, as a set of bits.
        survivors: whose vectors are in the sum.
        commitments: each sharer's commitment to its seed.
        level: of surplus noise that the survivors reach; 0 where none is taken off.
        anchors: what each sharer's keys of surplus noise must lead to.
    """

    suite: Suite
    members: Sequence[CheckIn]
    graph: Graph
    transcript: Transcript = field(repr=False)
    sharers: int
    survivors: int
    commitments: dict[int, bytes] = field(repr=False)
    level: int = 0
    anchors: dict[int, bytes] = field(default_factory=dict, repr=False)

    def owners(self, holder: int) -> list[int]:
        """Of whose secrets this survivor's opening gives one share each, in the order of the message."""
        own = self.graph.holder_set(holder)  # the graph is symmetric: whose share I hold holds mine
        return list(members_of(self.sharers & own))


class Openings:
    """The shares that came, and what they open.

    Args:
        attempted: what stands.
    """

    def __init__(self, attempted: Attempted) -> None:
        self._at = attempted
        self._shares: dict[int, dict[int, bytes]] = {i: {} for i in members_of(attempted.sharers)}
        self._surplus: dict[int, dict[int, bytes]] = {i: {} for i in members_of(attempted.survivors)}
        self._alone = {j for j in members_of(attempted.sharers & ~attempted.survivors) if not self._around(j)}
        self._good: tuple[int, ...] = ()
        self._lied = False
        self.culprits: set[str] = set()

    def __repr__(self) -> str:
        return f"Openings(of {len(self._shares)} clients, {'ready' if self.ready() else 'waiting'})"

    def add(self, holder: int, shares: Sequence[bytes], surplus: Sequence[bytes] = ()) -> None:
        """One survivor's shares.

        Args:
            holder: who gives them.
            shares: of every owner's seed or key.
            surplus: of every surviving owner's key of surplus noise, where a level is reached.

        Raises:
            SecureAggregationError: MALFORMED: another number of them. BAD_SHARE: one is out of range. Nothing is used.
        """
        owners = self._at.owners(holder)
        if len(shares) != len(owners):
            raise SecureAggregationError(Breach.MALFORMED, f"got {len(shares)} shares, expected {len(owners)}")
        alive = [owner for owner in owners if self._at.level and self._at.survivors >> owner & 1]
        if len(surplus) != len(alive):
            raise SecureAggregationError(
                Breach.MALFORMED, f"got {len(surplus)} shares of surplus noise, expected {len(alive)}"
            )
        for share in (*shares, *surplus):
            check_share(share)
        for owner, share in zip(alive, surplus, strict=True):
            self._surplus[owner][self._at.graph.point(owner, holder)] = share
        for owner, share in zip(owners, shares, strict=True):
            self._shares[owner][self._at.graph.point(owner, holder)] = share

    def ready(self) -> bool:
        """True when every secret that is needed has shares enough."""
        needed = self._at.graph.threshold
        return all(len(shares) >= needed for owner, shares in self._shares.items() if owner not in self._alone)

    def fit(self) -> bool:
        """True when the shares that came do give every secret that is needed; looks at few subsets, so that it can be asked often."""
        needed = [owner for owner in self._shares if owner not in self._alone]
        return all(any(self._fits(owner, points) for points in self._few_subsets(owner)) for owner in needed)

    def unmask(self, total: Vector, *, threads: int = 1) -> None:
        """Take every mask that is left off the sum, in place.

        Raises:
            SecureAggregationError: BAD_RECONSTRUCTION: some secret cannot be found; the sum is useless.
        """
        plus, minus = self._masks()
        apply_masks(total, plus, minus, suite=self._at.suite, threads=threads)

    def surplus_keys(self) -> tuple[bytes, ...]:
        """The survivors' keys of surplus noise, of the level that they reach; without those that false shares or promises hide."""
        found = []
        for owner, shares in self._surplus.items() if self._at.level else ():
            try:
                found.append(self._secret(owner, "surplus noise's key", shares, partial(self._leads, owner)))
            except SecureAggregationError as error:  # its noise stays in the sum, which is as good as it was paid for
                self.culprits |= set(error.culprits)
        return tuple(found)

    def _leads(self, owner: int, key: bytes) -> bool:
        return anchor_of(key, self._at.level) == self._at.anchors[owner]

    def _masks(self) -> tuple[list[bytes], list[bytes]]:
        """The keys of the streams to add and to take away."""
        at, plus = self._at, list[bytes]()
        minus = [derive(self._seed(i), at.transcript.self_mask(i)) for i in members_of(at.survivors)]
        for j in members_of(at.sharers & ~at.survivors):
            if j in self._alone:
                continue
            secret_of = agreement(at.suite, self._key(j))
            for i in self._around(j):
                # The survivor i added this mask where j > i, and took it away where j < i.
                key = derive(secret_of(at.members[i].mask_key), at.transcript.pair_mask(i, j))
                (minus if j > i else plus).append(key)
        return plus, minus

    def _around(self, j: int) -> list[int]:
        return list(members_of(self._at.survivors & self._at.graph.holder_set(j) & ~(1 << j)))

    def _seed(self, owner: int) -> bytes:
        return self._secret(owner, "seed", self._shares[owner], partial(self._is_seed, owner))

    def _key(self, owner: int) -> bytes:
        return self._secret(owner, "key", self._shares[owner], partial(self._is_key, owner))

    def _is_seed(self, owner: int, secret: bytes) -> bool:
        return self._at.transcript.seed_commitment(owner, secret) == self._at.commitments[owner]

    def _is_key(self, owner: int, secret: bytes) -> bool:
        try:
            return key_of_secret(self._at.suite, secret).public == self._at.members[owner].mask_key
        except SecureAggregationError:
            return False

    def _fits(self, owner: int, points: tuple[int, ...]) -> bool:
        secret = combine({x: self._shares[owner][x] for x in points})
        is_right = self._is_seed if self._at.survivors >> owner & 1 else self._is_key
        if secret is None or not is_right(owner, secret):
            return False
        self._good = points
        return True

    def _few_subsets(self, owner: int) -> Iterator[tuple[int, ...]]:
        return islice(self._subsets(self._shares[owner]), len(self._shares[owner]) + 1)

    def _subsets(self, shares: Mapping[int, bytes]) -> Iterator[tuple[int, ...]]:
        """Sets of holders in the order in which to try them: whoever told the truth of another secret comes first."""
        if self._good and shares.keys() >= set(self._good):
            yield self._good
        yield from subsets(list(shares), self._at.graph.threshold)

    def _secret(self, owner: int, what: str, shares: Mapping[int, bytes], fits: Callable[[bytes], bool]) -> bytes:
        graph = self._at.graph
        for points in self._subsets(shares):
            secret = combine({x: shares[x] for x in points})
            if secret is None or not fits(secret):
                self._lied = True
                continue
            self._good = points
            if self._lied:
                holders = graph.holders(owner)
                self.culprits |= {self._at.members[holders[x - 1]].client for x in liars(shares, points)}
            return secret
        name = self._at.members[owner].client
        raise SecureAggregationError(
            Breach.BAD_RECONSTRUCTION,
            f"{len(shares)} shares, threshold {graph.threshold}, do not give the {what} of {name!r}",
            culprits=tuple(sorted(self.culprits)) or (name,),
            hint="it shared another secret than it promised, or too many of its holders gave false shares",
        )
