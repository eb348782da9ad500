"""What leaves a site under masks, over many rounds of its real agent: as likely as any other bytes, whatever it learned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlearn.learning.backend import Exchange
from fedlearn.learning.local import initial_weights
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from fedlearn.secagg.hooks import from_client
from fedlearn.tasks import load_task
from tests.support.hostile_coordinator import Coordinator
from tests.support.tiny_task import CLIENTS, NAME, tiny_study

ROUNDS = 20
HIDDEN = {"hidden": 100}
SIGMAS = 6.0
"""An honest run is further off with a chance below 1e-7 in any of the figures here."""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


async def sent(bundles, lr):
    """What one site sends in every round, and the bytes of its vectors, shape (rounds, coordinates, 4)."""
    study = tiny_study(
        "secure_aggregation.enabled=true", f"rounds={ROUNDS}", f"train.lr={lr}", "task.options={hidden=100}"
    )
    model = initial_weights(load_task(NAME, HIDDEN), study)
    length = sum(array.size for array in model.values())
    server, bodies = Coordinator(bundles, study), []
    for number in range(1, ROUNDS + 1):
        asked = {"at": (number, 1), "model": model, "length": length}
        _, told = await server.keyed(**asked)
        bodies.append((await server.said("ada", Exchange.TRAIN, told["ada"], **asked)).body)
    vectors = [np.frombuffer(from_client(body).vector, dtype=np.uint8) for body in bodies]
    return bodies, np.stack(vectors).reshape(ROUNDS, length + 1, 4)


def off(counts):
    """By how many standard deviations counts of equally likely values are off in their sum of squares."""
    expected, free = counts.sum() / counts.size, counts.size - 1
    return (float(((counts - expected) ** 2).sum() / expected) - free) / math.sqrt(2 * free)


def differ(one, other):
    """By how many standard deviations two counts of equally many draws differ."""
    free = one.size - 1
    return (float(((one - other) ** 2 / np.maximum(one + other, 1)).sum()) - free) / math.sqrt(2 * free)


def counted(values):
    return np.bincount(values.reshape(-1), minlength=256).astype(np.float64)


async def test_masked_vectors_are_uniform_whatever_was_learned(bundles):
    """Two runs, one of updates of almost nothing and one of long ones: neither their sizes nor their values tell which is which."""
    runs = {lr: await sent(bundles, lr) for lr in ("1e-9", "0.9")}
    for bodies, values in runs.values():
        assert abs(off(counted(values))) < SIGMAS
        for place in range(4):
            assert abs(off(counted(values[:, :, place]))) < SIGMAS, "the high byte holds an update's sign"
        bits = np.unpackbits(values, axis=None)
        assert abs(bits.mean() - 0.5) * 2 * math.sqrt(bits.size) < SIGMAS
        again = (values[1:] == values[:-1]).mean() - 1 / 256
        assert abs(again) * math.sqrt(values[1:].size * 256) < SIGMAS, "no round's mask is another one's"
        assert len({len(from_client(body).vector) for body in bodies}) == 1
        # What is left is protobuf and a signature in DER, whose length follows from its own randomness.
        assert {len(body) - values[0].size for body in bodies} <= set(range(78, 92))
    (_, one), (_, other) = runs.values()
    assert one.shape == other.shape
    assert abs(differ(counted(one), counted(other))) < SIGMAS
    assert abs(((one == other).mean() - 1 / 256) * math.sqrt(one.size * 256)) < SIGMAS


def test_vectors_without_masks_would_be_found_out():
    """The figures above are worth something: rounded updates under no mask are off by far."""
    values = np.random.default_rng(3).normal(0, 2**20, size=(ROUNDS, 603)).astype(np.int32).view(np.uint8)
    assert off(counted(values)) > 100 * SIGMAS
    assert off(counted(values.reshape(-1, 4)[:, 3])) > 100 * SIGMAS
