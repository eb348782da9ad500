"""Write the pinned vectors of secure aggregation: `python -m tests.vectors.secagg.generate`. The tests compare; this only runs when the protocol changes.

primitives.json   key streams, derived keys, shares and packed vectors for fixed inputs, good and bad
noise.json        tables, numbers and rotations for fixed keys; one client's noisy update, and what surplus it leaves
transcripts.json  one attempt of four clients for each suite: every message as bytes, the transcript, the sum
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.secagg.messages import Delivery, to_bytes
from fedlearn.secagg.noise import Noise, magnitudes, sample
from fedlearn.secagg.plan import Profile
from fedlearn.secagg.primitives import SeededDraw, Suite, derive, key_stream, new_identity, new_key, seal, sign
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import RING_BITS, pack, to_ring
from fedlearn.secagg.rotation import rotated
from fedlearn.secagg.server import Stage
from fedlearn.secagg.shamir import PRIME, SHARE_BYTES, split
from fedlearn.secagg.surplus import Surplus, anchor_of, level_keys
from tests.support.secagg_world import SUBJECT, World, name_of

FOLDER = Path(__file__).parent


def primitives() -> dict[str, Any]:
    draw = SeededDraw(b"vectors")
    keys = {}
    for suite in Suite:
        pair, identity = new_key(suite, draw), new_identity(suite, draw)
        keys[suite.name] = {
            "secret": pair.secret.hex(),
            "public": pair.public.hex(),
            "identity_secret": identity.secret.hex(),
            "identity": identity.public.hex(),
            "signature_of_message": sign(suite, identity.secret, b"message").hex(),
            "stream_at_0": key_stream(suite, bytes(range(32))).update(bytes(32)).hex(),
            "stream_at_1024": key_stream(suite, bytes(range(32)), 1024).update(bytes(32)).hex(),
        }
    secret = bytes(range(32))
    shares = split(secret, 3, 5, SeededDraw(b"shares"))
    encoding = Encoding(4, 3, 1.0, ring_bits=24, weight_cap=10)
    update = [0.25, -0.5, 1e-6, 0.0]
    return {
        "keys": keys,
        "derive": {"secret": secret.hex(), "info": b"info".hex(), "key": derive(secret, b"info").hex()},
        "seal": {
            "key": secret.hex(),
            "plain": b"plain".hex(),
            "data": b"data".hex(),
            "sealed": seal(secret, b"plain", b"data").hex(),
        },
        "shamir": {
            "secret": secret.hex(),
            "threshold": 3,
            "shares": [share.hex() for share in shares],
            "bad": {
                "not below p": PRIME.to_bytes(SHARE_BYTES, "big").hex(),
                "32 bytes": bytes(32).hex(),
                "34 bytes": bytes(34).hex(),
                "empty": "",
            },
        },
        "encoding": {
            "update": update,
            "weight": 7,
            "key": secret.hex(),
            "packed": pack(encoding.encode(np.array(update), 7, secret), 24).hex(),
        },
        "packing": {str(b): pack(to_ring(np.array([-3, 0, 1, 2 ** (b - 1) - 1]), b), b).hex() for b in RING_BITS},
    }


def noise() -> dict[str, Any]:
    """What a server that takes surplus noise off must draw as the client drew it, whatever machine either runs on."""
    key, top = bytes(range(32)), bytes(range(32, 64))
    drawn = [
        {
            "kind": kind.value,
            "variance": variance,
            "first": sample(kind, variance, 20_000, key)[[*range(12), -1]].tolist(),
        }
        for kind in Noise
        for variance in (0.05, 3.0, 54321.5, 1e8)
    ]
    tables = {
        f"{kind.value} {variance}": hashlib.sha256(repr(magnitudes(kind, variance)).encode()).hexdigest()
        for kind in Noise
        for variance in (0.05, 3.0, 54321.5)
    }
    surplus = Surplus.over(1000.0, 5, {8: 6, 10: 8})
    vector = np.zeros(20_000, dtype="<u4")
    surplus.add(vector, key, top)
    full = hashlib.sha256(vector.tobytes()).hexdigest()
    surplus.remove(vector, 10, [top])
    return {
        "key": key.hex(),
        "drawn": drawn,
        "magnitudes": tables,
        "rotation": [round(x, 9) for x in rotated(np.arange(7.0), key).tolist()],
        "surplus": {
            "top": top.hex(),
            "keys": [one.hex() for one in level_keys(top, 2)],
            "anchor": anchor_of(top, 2).hex(),
            "added": full,
            "left": hashlib.sha256(vector.tobytes()).hexdigest(),
        },
    }


def transcript(suite: Suite, profile: Profile, bits: int) -> dict[str, Any]:
    """Four clients, the last of which shares and then vanishes."""
    world = World(4, seed="vectors", ring_bits=bits, weight_cap=3, plan={"suite": suite, "profile": profile})
    said: list[list[str]] = []
    world.rostered()
    said += [["check-in", name, to_bytes(client._own).hex()] for name, client in world.clients.items()]
    while world.out:
        for name, message in world.out.items():
            said.append([type(message).__name__, f"to {name}", to_bytes(message).hex()])
        for name, message in list(world.out.items()):
            reply = world.answer(name, message)
            if isinstance(message, Delivery) and name == name_of(3):
                continue
            said.append([type(reply).__name__, name, to_bytes(reply).hex()])
            world.server.receive(name, reply)
        world.out = world.server.close()
    assert world.server.stage is Stage.OPENED
    total = world.server.total
    return {
        "suite": suite.name,
        "profile": profile.name,
        "ring_bits": bits,
        "identities": {name: one.key.public.hex() for name, one in world.identities.items()},
        "terms": world.terms.digest().hex(),
        "plan": world.plan.digest().hex(),
        "subject": SUBJECT.hex(),
        "transcript": world.server._transcript.digest.hex(),
        # Rosters and vectors repeat: the hash says as much as the bytes.
        "messages": [
            [kind, who, data if len(data) < 400 else "sha256 " + hashlib.sha256(bytes.fromhex(data)).hexdigest()]
            for kind, who, data in said
        ],
        "sum": [*total.integers.tolist(), total.weight],
    }


def transcripts() -> list[dict[str, Any]]:
    return [
        transcript(Suite.X25519_AES256, Profile.SEMI_MALICIOUS, 32),
        transcript(Suite.X25519_CHACHA20, Profile.MALICIOUS, 24),
        transcript(Suite.P256_AES256, Profile.MALICIOUS, 16),
    ]


def main() -> None:
    for name, made in (("primitives", primitives()), ("noise", noise()), ("transcripts", transcripts())):
        (FOLDER / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
