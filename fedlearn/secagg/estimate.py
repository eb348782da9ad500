"""What a plan costs and what it withstands, before anybody runs it: bytes by building the messages, times by timing this machine's primitives."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedlearn.release.keys import AttemptId
from fedlearn.secagg.graph import PPM, Parameters
from fedlearn.secagg.masks import BLOCK_BYTES, apply_masks
from fedlearn.secagg.messages import (
    NONCE_BYTES,
    SEALED_BYTES,
    Agreement,
    Agreements,
    Delivery,
    Masked,
    Message,
    Opening,
    Reveal,
    Reveals,
    Roster,
    Shares,
    Survivors,
    to_bytes,
)
from fedlearn.secagg.plan import DIGEST_BYTES, CheckIn, Plan, Terms
from fedlearn.secagg.primitives import KEY_BYTES, KeyPair, agreement, derive, new_identity, new_key, sign, verified
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import dtype_of
from fedlearn.secagg.shamir import SHARE_BYTES, split

_NAME_BYTES: Final = 16
_FRAME_BYTES: Final = 16
"""What protobuf puts around a vector, at most."""
_TRIES: Final = 5


@dataclass(frozen=True)
class Sizes:
    """Bytes of one client in one round when everybody stays.

    Args:
        up: what it sends, the masked vector included.
        down: what it receives, the model not included.
        vector: the masked vector alone.
        plain: the same update as float32.
    """

    up: int
    down: int
    vector: int
    plain: int


@dataclass(frozen=True)
class Seconds:
    """CPU seconds on this machine, as its primitives run now; one thread.

    Args:
        client_keys: a client before its update is ready: keys, everybody's signatures, shares.
        client_mask: a client with its update: rounding and masking.
        server_open: the server when the assumed fraction has dropped out: shares, keys and masks; divide by the cores.
    """

    client_keys: float
    client_mask: float
    server_open: float


@dataclass(frozen=True)
class Coalitions:
    """How many colluding clients it takes, the server with them, to read one client's update, whatever else they see.

    Args:
        allowed: adversarial clients among one client's holders that the plan withstands.
        lying: enough when the server lies about who dropped out.
        looking: enough when the server only looks.
    """

    allowed: int
    lying: int
    looking: int


@dataclass(frozen=True)
class Estimate:
    """All of it."""

    plan: Plan
    parameters: Parameters
    dropouts: int
    exchanges: int
    sizes: Sizes
    seconds: Seconds
    coalitions: Coalitions


def estimate(plan: Plan) -> Estimate:
    """What a round with `plan.encoding.clients` clients costs and withstands."""
    found = plan.parameters(plan.encoding.clients)
    dropouts = found.holders - found.threshold
    if not found.complete:  # the threshold is met around everyone with all but 2**-20, up to the assumed rate
        dropouts = plan.encoding.clients * round(plan.dropout * PPM) // PPM
    return Estimate(
        plan,
        found,
        min(dropouts, plan.encoding.clients - plan.minimum),
        (2 if found.complete else 3) + plan.agrees(found.clients),
        sizes(plan, found),
        seconds(plan, found),
        Coalitions(found.adversarial, 2 * found.threshold - found.holders, found.threshold),
    )


def sizes(plan: Plan, found: Parameters) -> Sizes:
    """The lengths of the messages themselves, filled with zeros."""
    n, k, key = found.clients, found.degree, plan.suite.public_bytes
    signature, everybody = bytes(72 if key == 33 else 64), (1 << found.clients) - 1
    check_in = CheckIn("x" * _NAME_BYTES, bytes(key), bytes(key), bytes(DIGEST_BYTES), signature)
    sealed = (bytes(SEALED_BYTES + SHARE_BYTES * len(plan.surplus)),) * k
    surplus = (bytes(SHARE_BYTES),) * (found.holders if plan.surplus else 0)
    up: list[Message] = [
        check_in,
        Shares(bytes(DIGEST_BYTES), sealed, bytes(KEY_BYTES if plan.surplus else 0)),
        Opening((bytes(SHARE_BYTES),) * found.holders, signature, surplus),
    ]
    down: list[Message] = [Roster((check_in,) * n), Delivery(everybody, sealed), Survivors(everybody, (signature,) * k)]
    if not found.complete:
        up.append(Reveal(bytes(NONCE_BYTES)))
        down.append(Reveals((bytes(NONCE_BYTES),) * n))
    if plan.agrees(n):
        up.append(Agreement(signature))
        down.append(Agreements(everybody, (signature,) * n))
    vector = plan.encoding.upload_bytes
    small = sum(len(to_bytes(message)) for message in up) + len(to_bytes(Masked(signature, bytes(2)))) + _FRAME_BYTES
    return Sizes(small + vector, sum(len(to_bytes(m)) for m in down), vector, 4 * plan.encoding.length)


def seconds(plan: Plan, found: Parameters) -> Seconds:
    """From a few milliseconds of each primitive."""
    n, k, e = found.clients, found.degree, plan.encoding
    gone = n * round(plan.dropout * PPM) // PPM
    draw, suite = os.urandom, plan.suite
    one, other, identity = new_key(suite, draw), new_key(suite, draw), new_identity(suite, draw)
    terms = Terms("estimate", AttemptId(1, 1), plan)
    signed = sign(suite, identity.secret, terms.digest())
    verify = _least(20, lambda: verified(suite, identity.public, signed, terms.digest()))
    agree = _least(20, lambda: _agree(plan, one, other))
    share = _least(1, lambda: split(one.secret, found.threshold, found.holders, draw))
    vector = np.zeros(4 * BLOCK_BYTES, dtype=dtype_of(e.ring_bits))
    stream = _least(1, lambda: apply_masks(vector, [one.secret], [], suite=suite)) / len(vector)
    sample = Encoding(min(e.length, 200_000), e.clients, e.clip_l2, e.ring_bits, e.value_bits)
    update = np.full(sample.length, 1e-3, dtype=np.float32)
    encode = _least(1, lambda: sample.encode(update, 1, one.secret)) / sample.length
    survivors, d = n - gone, e.coordinates
    return Seconds(
        client_keys=(n + k) * verify + k * agree + 2 * share,
        client_mask=d * encode + k * agree + (k + 1) * d * stream,
        server_open=survivors * verify + gone * k * agree + (survivors + gone * k * survivors / n) * d * stream,
    )


def _agree(plan: Plan, one: KeyPair, other: KeyPair) -> bytes:
    return derive(agreement(plan.suite, one.secret)(other.public), b"estimate")


def _least(times: int, function: Callable[[], object]) -> float:
    """CPU seconds of one call, the least of a few tries."""
    found = []
    for _ in range(_TRIES):
        start = time.process_time()
        for _ in range(times):
            function()
        found.append((time.process_time() - start) / times)
    return min(found)
