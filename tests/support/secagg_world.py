"""A whole attempt at secure aggregation on one desk: every party, every message, and what an adversary could make of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.release.keys import AttemptId
from fedlearn.secagg import graph
from fedlearn.secagg.client import ClientRound, Identity
from fedlearn.secagg.graph import Graph, members_of
from fedlearn.secagg.memory import run_in_memory
from fedlearn.secagg.plan import CheckIn, Plan, Profile, Terms
from fedlearn.secagg.primitives import SeededDraw, new_identity, sign
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import from_ring
from fedlearn.secagg.server import ServerRound, Stage

FIRST = AttemptId(1, 1)
SUBJECT = b"model and configuration digest.."


def name_of(index: int) -> str:
    return f"site-{index:03d}"


class World:
    """`n` clients and a server.

    Args:
        n: clients.
        at: the attempt.
        seed: of all randomness; equal worlds say equal bytes.
        plan: changes to the plan.
        encoding: changes to the encoding.
        room: clients that the encoding has room for; n without it.
    """

    def __init__(
        self,
        n: int,
        *,
        at: AttemptId = FIRST,
        seed: str = "world",
        room: int = 0,
        plan: Any = None,
        **encoding: Any,
    ) -> None:
        defaults = {"length": 7, "clients": room or n, "clip_l2": 1.0}
        self.plan = Plan(Encoding(**(defaults | encoding)), **(plan or {}))
        self.terms = Terms("run", at, self.plan)
        self.suite = self.plan.suite
        self.identities = {
            name_of(i): Identity(name_of(i), new_identity(self.suite, self.draw(f"identity {i}"))) for i in range(n)
        }
        self.trust = {name: one.key.public for name, one in self.identities.items()}
        self.clients = {
            name: ClientRound(self.terms, one, self.trust, self.draw(f"{seed} {name} {at}"))
            for name, one in self.identities.items()
        }
        self.server = ServerRound(self.terms, self.trust, SUBJECT, threads=1)
        self.vectors = {name: self.vector(i) for i, name in enumerate(self.clients)}
        self.out: dict[str, Any] = {}

    @staticmethod
    def draw(label: str) -> SeededDraw:
        return SeededDraw(label.encode())

    def vector(self, i: int) -> Any:
        encoding = self.plan.encoding
        update = np.random.default_rng(i).normal(size=encoding.length)
        return encoding.encode(update, encoding.weight_cap, bytes([i % 256]) * 32)

    def expected(self, names: Any) -> list[int]:
        """The exact sum of some clients' integers, the weight last, by Python's integers."""
        bits = self.plan.encoding.ring_bits
        columns = zip(*(from_ring(self.vectors[name], bits).tolist() for name in names), strict=True)
        return [sum(column) for column in columns]

    def run(self, arrives: Callable[[Stage, str], bool] = lambda _stage, _client: True) -> Any:
        """The attempt as `run_in_memory` runs it."""
        return run_in_memory(self.server, self.clients, self.vectors, SUBJECT, arrives=arrives)

    def sign_in(self, name: str, check_in: CheckIn, terms: Terms | None = None) -> CheckIn:
        """A check-in signed anew by its owner: what a corrupt client can do."""
        key = self.identities[name].key
        return replace(check_in, signature=sign(self.suite, key.secret, check_in.signed(terms or self.terms)))

    # Stage by stage; `out` is what the honest server says next, for the test to change.

    def rostered(self) -> World:
        """Everybody checked in; `out` holds the roster."""
        if self.server.stage is not Stage.CHECK_IN:
            return self
        for name, client in self.clients.items():
            client.bind(SUBJECT)
            self.server.receive(name, client.check_in())
        self.out = self.server.close()
        return self

    def step(self) -> World:
        """Deliver `out`, collect the answers, close the stage."""
        for name, message in self.out.items():
            reply = self.answer(name, message)
            self.server.receive(name, reply)
        self.out = self.server.close()
        return self

    def answer(self, name: str, message: Any) -> Any:
        reply = self.clients[name].receive(message)
        return self.clients[name].mask(self.vectors[name].copy()) if reply is None else reply

    def delivered(self) -> World:
        """Shares came; `out` holds the deliveries."""
        self.rostered()
        while self.server.stage is not Stage.MASK:
            self.step()
        return self

    def masked(self) -> World:
        """Vectors came; `out` holds the survivors."""
        return self.delivered().step()

    def agreed(self) -> World:
        """Malicious profile: agreements came; `out` holds them."""
        return self.masked().step()


def malicious(n: int, **more: Any) -> World:
    return World(n, plan={"profile": Profile.MALICIOUS}, **more)


def learnable(graph: Graph, sharers: int, told: Mapping[int, int], corrupt: int) -> list[set[int]]:
    """The sets of honest clients whose sums a server can compute, by counting what it was given.

    Args:
        graph: the graph.
        sharers: who shared keys and sent a vector, honest or not.
        told: for each client that opened, honest or not, the survivors that it was told.
        corrupt: who works for the server and gives it both kinds of share.

    A client's own mask falls with `threshold` shares of its seed, all its pairwise masks with `threshold` shares of its key, and a pairwise mask
    with a corrupt client is known. What is left connects honest clients: only the sum over a whole component can be had, and only if
    all own masks in it have fallen.
    """
    seeds, keys = (dict.fromkeys(members_of(sharers), 0) for _ in range(2))
    for owner in seeds:
        for holder in graph.holders(owner):
            if not sharers >> holder & 1:
                continue
            if corrupt >> holder & 1:
                seeds[owner] += 1
                keys[owner] += 1
            elif holder in told:
                (seeds if told[holder] >> owner & 1 else keys)[owner] += 1
    fallen = {i for i, count in seeds.items() if count >= graph.threshold}
    bare = {i for i, count in keys.items() if count >= graph.threshold}
    honest = {i for i in seeds if not corrupt >> i & 1}
    assert not fallen & bare & honest, "both masks of one client have fallen"
    left, found = honest - bare, []
    while left:
        component, edge = set(), {left.pop()}
        while edge:
            one = edge.pop()
            component.add(one)
            near = set(graph.neighbours(one)) & left
            left -= near
            edge |= near
        if component <= fallen:
            found.append(component)
    return found


@contextlib.contextmanager
def sparse_graphs(above: int = 10) -> Iterator[None]:
    """The code above 200 clients, at a size that a test can afford."""
    before, graph.COMPLETE_LIMIT = graph.COMPLETE_LIMIT, above
    graph.parameters.cache_clear()
    try:
        yield
    finally:
        graph.COMPLETE_LIMIT = before
        graph.parameters.cache_clear()
