"""Two session machines on a stream that is cut, damaged and restarted at random: every message runs and is answered once."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.link_world import World

BUFFERS = st.lists(st.binary(max_size=70), max_size=5).map(tuple)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    messages=st.lists(BUFFERS, min_size=1, max_size=6),
    cut=st.floats(0, 0.1),
    restart=st.floats(0, 0.02),
    cancel=st.floats(0, 0.05),
    damage=st.booleans(),
)
def test_every_message_is_answered_once_with_its_own_bytes(seed, messages, cut, restart, cancel, damage):
    rng = random.Random(seed)
    world = World(rng)
    expected, cancelled, todo = {}, set(), list(messages)
    for _ in range(400):
        if todo and rng.random() < 0.2:
            buffers = todo.pop()
            expected[world.server.push(buffers)] = buffers[::-1]
        elif rng.random() < cut:
            world.connect()
        elif rng.random() < restart:
            world.restart_client()
        elif rng.random() < cancel and world.server.pending:
            message_id = rng.choice(sorted(world.server.pending))
            world.server.cancel(message_id)
            cancelled.add(message_id)
        else:
            world.move(damage=damage)
    for buffers in todo:
        expected[world.server.push(buffers)] = buffers[::-1]
    world.settle()

    assert not world.server.pending
    assert set(expected) - cancelled == set(world.server.answers) - cancelled
    for message_id, buffers in world.server.answers.items():
        assert buffers == expected[message_id]
    for client in world.clients:
        assert len(client.ran) == len(set(client.ran)), "a message ran twice in one process"
    for end in (world.server, world.client):
        assert not end.mailbox.incoming
    assert not world.server.mailbox.outgoing
    assert all(reply.reply_to in cancelled for reply in world.client.mailbox.outgoing.values())


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 3_000), cuts=st.integers(1, 8))
def test_cuts_cost_only_what_was_in_flight(seed, size, cuts):
    rng = random.Random(seed)
    world = World(rng)
    world.settle()
    world.server.push((rng.randbytes(size),))
    for _ in range(cuts):
        for _ in range(rng.randrange(40)):
            world.move()
        lost = sum(map(len, world.up)) + sum(map(len, world.down))
        world.sent = {name: sent - lost * (name == "up") for name, sent in world.sent.items()}
        held = sum(m.received_bytes for m in world.client.mailbox.incoming.values())
        world.connect()
        offers = world.client.mailbox.offers()
        assert sum(o.received_bytes for o in offers) == held
    world.settle()
    assert len(world.server.answers) == 1


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_memory_of_the_session_is_empty_once_all_is_answered(seed):
    world = World(random.Random(seed))
    for size in (0, 1, 100, 1_000):
        world.server.push((b"x" * size,))
    world.settle()
    for end in (world.server, world.client):
        session = end.session
        assert not session._queue
        assert not session._sendings
        assert not session._active
        assert not session._declined
