"""The server by itself: it repeats itself, keeps one sum, and uses its cores."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedlearn.errors import LocalProtocolError
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.messages import Agreement
from fedlearn.secagg.plan import Profile
from fedlearn.secagg.server import ServerRound, Stage
from tests.support.secagg_world import SUBJECT, World


def test_the_server_repeats_itself_when_it_is_fed_the_same_again():
    """What a coordinator needs to come back after a crash: the messages, nothing else."""
    world = World(5).rostered()
    kept = [{name: client._own for name, client in world.clients.items()}]
    while world.out:
        replies = {name: world.answer(name, message) for name, message in world.out.items() if name != "site-004"}
        kept.append(replies)
        for name, reply in replies.items():
            world.server.receive(name, reply)
        world.out = world.server.close()
    again = ServerRound(world.terms, world.trust, SUBJECT)
    for messages in kept:
        for name, message in reversed(messages.items()):
            again.receive(name, message)
        again.close()
    assert again.stage is Stage.OPENED
    assert np.array_equal(again.total.integers, world.server.total.integers)


def test_a_server_has_no_total_before_it_is_open_and_nothing_to_close_after():
    world = World(3).masked()
    with pytest.raises(LocalProtocolError, match="no total"):
        _ = world.server.total
    world.step()
    assert world.server.total.weight == 3
    with pytest.raises(LocalProtocolError, match="nothing to close"):
        world.server.close()


def test_memory_is_one_sum_however_many_vectors_come():
    world = World(16, length=200_000).delivered()
    sent = {name: world.answer(name, message) for name, message in world.out.items()}
    one = world.plan.encoding.upload_bytes
    tracemalloc.start()
    try:
        for name, message in sent.items():
            world.server.receive(name, message)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < one / 4
    assert peak < 2 * one


@pytest.mark.parametrize("threads", [1, 2, 3, None])
def test_any_number_of_threads_opens_the_same_sum(threads):
    world = World(5, length=200_000, ring_bits=24)
    world.server = ServerRound(world.terms, world.trust, SUBJECT, threads=threads)
    total = world.run(lambda stage, client: not (stage is Stage.MASK and client == "site-001"))
    assert [*total.integers.tolist(), total.weight] == world.expected(world.server.survivors)


def test_whom_it_waits_for():
    world = World(4)
    assert world.server.waiting == frozenset()
    world.rostered()
    assert world.server.waiting == frozenset(world.clients)
    world.server.receive("site-002", world.answer("site-002", world.out["site-002"]))
    assert world.server.waiting == frozenset(world.clients) - {"site-002"}


@pytest.mark.parametrize(
    "stage", [Stage.CHECK_IN, Stage.SHARE, Stage.MASK, Stage.AGREE, Stage.OPEN], ids=lambda s: s.name
)
def test_a_stage_to_which_too_few_came_voids_the_attempt(stage):
    minimum = 5 if stage in {Stage.SHARE, Stage.MASK} else 4
    world = World(5, plan={"minimum": minimum, "profile": Profile.MALICIOUS})
    came = 3 if stage in {Stage.CHECK_IN, Stage.AGREE, Stage.OPEN} else 4
    if stage is Stage.CHECK_IN:
        for client in list(world.clients.values())[:came]:
            world.server.receive(client.name, client.check_in())
    else:
        world.rostered()
        while world.server.stage is not stage:
            world.step()
        for name, message in list(world.out.items())[:came]:
            world.server.receive(name, world.answer(name, message))
    with pytest.raises(SecureAggregationError) as caught:
        world.server.close()
    assert caught.value.breach is Breach.BELOW_THRESHOLD
    assert world.server.stage is Stage.VOID
    assert world.server.waiting == frozenset()
    with pytest.raises(SecureAggregationError, match="void"):
        world.server.receive("site-000", Agreement(bytes(64)))
