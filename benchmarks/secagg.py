# ruff: noqa: SLF001  # Flower's client has no other entry to its steps
"""Secure aggregation's own cost, without a network: CPU seconds of one client and of the server, beside the raw cipher and Flower's SecAgg+.

Everything is measured in one run, each number the least of several, and what counts are the ratios. Every sum is compared with the exact
one. Flower's figures are its own client functions (`flwr.client.mod.secure_aggregation`), fed what its server would send: it signs and verifies
nothing, so its share phase has no counterpart to the signatures that ours verifies.

    python -m benchmarks.secagg [--quick] [--json] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.release.keys import AttemptId
from fedlearn.secagg import checks, graph
from fedlearn.secagg.client import ClientRound, Identity
from fedlearn.secagg.masks import BLOCK_BYTES, apply_masks, cores
from fedlearn.secagg.messages import to_bytes
from fedlearn.secagg.plan import Plan, Profile, Terms
from fedlearn.secagg.primitives import Suite, key_stream, new_identity
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.ring import from_ring
from fedlearn.secagg.server import ServerRound, Stage

RESULTS = Path(__file__).parent / "results" / "secagg.md"
LENGTH = 1_700_000
SUITE = Suite.X25519_AES256
ADVERSARIAL, DROPOUT = 0.2, 0.1
"""At 100 clients a degree of 42, at 1,000 of 140."""
SUBJECT = bytes(32)


@dataclass(frozen=True)
class Row:
    """One line: what was measured, in what, and what it should be."""

    what: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None


def cpu(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def least(times: int, *functions: Callable[[], Any]) -> list[float]:
    """The least CPU seconds of each function; they take turns, so that a slow moment of the machine meets them all."""
    found = [[cpu(function) for function in functions] for _ in range(times)]
    return [min(column) for column in zip(*found, strict=True)]


def raw_cipher(suite: Suite, size: int) -> Callable[[], None]:
    zeros, buffer = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES)

    def run() -> None:
        cipher = key_stream(suite, bytes(32))
        for _ in range(size // BLOCK_BYTES):
            cipher.update_into(zeros, buffer)

    return run


def masks(times: int) -> list[Row]:
    """Twenty masks on 1.7 million coordinates, against the cipher alone and Flower's generator."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    vector = np.zeros(LENGTH, dtype="<u4")
    keys = [os.urandom(32) for _ in range(20)]
    size = 20 * vector.nbytes
    theirs = np.zeros(LENGTH, dtype=np.int64)

    def flower() -> None:
        nonlocal theirs
        theirs = theirs + pseudo_rand_gen(keys[0], 2**32, [(LENGTH,)])[0]

    ours, raw, peer = least(
        4 * times, lambda: apply_masks(vector, keys[:10], keys[10:], suite=SUITE), raw_cipher(SUITE, size), flower
    )
    chacha, raw_chacha = least(
        4 * times,
        lambda: apply_masks(vector, keys[:10], keys[10:], suite=Suite.X25519_CHACHA20),
        raw_cipher(Suite.X25519_CHACHA20, size),
    )
    return [
        Row("mask expansion, AES-256-CTR", size / ours / 1e9, "GB/s"),
        Row("the raw cipher, same buffers", size / raw / 1e9, "GB/s"),
        Row("mask expansion to raw cipher", raw / ours, "x", "at least 0.75", raw / ours >= 0.75),
        Row("mask expansion, ChaCha20", size / chacha / 1e9, "GB/s"),
        Row("ChaCha20 to its raw cipher", raw_chacha / chacha, "x"),
        Row("faster than Flower's masks", 20 * peer / ours, "x", "at least 5", 20 * peer / ours >= 5),
    ]


class Party:
    """A plan, identities, clients and a server; the clients' signatures of each other may be taken on trust while they are set up."""

    def __init__(self, n: int, length: int, *, ring_bits: int = 32, profile: Profile = Profile.SEMI_MALICIOUS) -> None:
        self.encoding = Encoding(length, n, 1.0, ring_bits=ring_bits)
        plan = Plan(self.encoding, adversarial=ADVERSARIAL, dropout=DROPOUT, suite=SUITE, profile=profile)
        self.terms = Terms("benchmark", AttemptId(1, 1), plan)
        self.identities = [Identity(f"c{i:04d}", new_identity(SUITE, os.urandom)) for i in range(n)]
        self.trust = {one.name: one.key.public for one in self.identities}
        self.server = ServerRound(self.terms, self.trust, SUBJECT)
        self.clients = {one.name: self.client(one) for one in self.identities}
        self.spent = dict.fromkeys(Stage, 0.0)
        self.total = np.zeros(length + 1, dtype=np.int64)

    def client(self, identity: Identity) -> ClientRound:
        made = ClientRound(self.terms, identity, self.trust, os.urandom)
        made.bind(SUBJECT)
        return made

    def feed(self, name: str, message: Any) -> None:
        stage = self.server.stage
        self.spent[stage] += cpu(lambda: self.server.receive(name, message))

    def close(self) -> Any:
        stage, before = self.server.stage, time.process_time()
        out = self.server.close()
        self.spent[stage] += time.process_time() - before
        return out

    def check_in(self) -> Any:
        for name, client in self.clients.items():
            self.feed(name, client.check_in())
        return self.close()

    def encoded(self, name: str) -> Any:
        update = np.random.default_rng(int(name[1:])).standard_normal(self.encoding.length, dtype=np.float32)
        return self.encoding.encode(update, 1, os.urandom(32))

    def serve(self, dropped: set[str]) -> None:
        """The whole round with the server's time taken; clients that drop do so after sharing."""
        with trusting():
            out = self.check_in()
            while self.server.stage is not Stage.MASK:
                for name, message in out.items():
                    reply = self.clients[name].receive(message)
                    self.feed(name, reply)
                out = self.close()
            for name, message in out.items():
                self.clients[name].receive(message)
                if name in dropped:
                    continue
                vector = self.encoded(name)
                self.total += from_ring(vector, self.encoding.ring_bits)
                self.feed(name, self.clients[name].mask(vector))
            out = self.close()
            while out:
                for name, message in out.items():
                    self.feed(name, self.clients[name].receive(message))
                out = self.close()
        assert np.array_equal(self.server.total.integers, self.total[:-1])
        assert self.server.total.weight == self.total[-1]


@contextlib.contextmanager
def trusting() -> Iterator[None]:
    """The clients do not verify each other's signatures: their time is measured elsewhere, and here there are hundreds of them."""
    real = checks.verified
    checks.verified = lambda *_: True
    try:
        yield
    finally:
        checks.verified = real


@contextlib.contextmanager
def sparse_from(clients: int) -> Iterator[None]:
    """Take the sparse graph from so many clients on, to measure degree 42 at 100 clients."""
    before, graph.COMPLETE_LIMIT = graph.COMPLETE_LIMIT, clients - 1
    graph.parameters.cache_clear()
    try:
        yield
    finally:
        graph.COMPLETE_LIMIT = before
        graph.parameters.cache_clear()


def our_client(n: int, length: int, ring_bits: int) -> tuple[dict[str, float], int]:
    """CPU seconds of each step of one client of `n`, every check on, and the bytes that it uploads."""
    party = Party(n, length, ring_bits=ring_bits)
    first = party.identities[0].name
    probe, own = party.clients[first], [None]
    spent = {"keys": cpu(lambda: own.__setitem__(0, probe.check_in()))}
    update = np.random.default_rng(1).standard_normal(length, dtype=np.float32)
    vectors: list[Any] = []
    party.server.receive(first, own[0])
    for name, client in party.clients.items():
        if name != first:
            party.server.receive(name, client.check_in())
    out = party.close()
    with trusting():
        sent = {name: client.receive(out[name]) for name, client in party.clients.items() if name != first}
    answer: list[Any] = []
    spent["share"] = cpu(lambda: answer.append(probe.receive(out[first])))
    for name, message in {**sent, first: answer[0]}.items():
        party.server.receive(name, message)
    delivered = party.close()
    spent["take shares"] = cpu(lambda: probe.receive(delivered[first]))
    spent["encode"] = cpu(lambda: vectors.append(party.encoding.encode(update, 1, os.urandom(32))))
    masked: list[Any] = []
    spent["mask and pack"] = cpu(lambda: masked.append(probe.mask(vectors[0])))
    party.server.receive(first, masked[0])
    zeros = np.zeros(length + 1, dtype=vectors[0].dtype)
    for name, client in party.clients.items():
        if name != first:
            client.receive(delivered[name])
            party.server.receive(name, client.mask(zeros.copy()))
    survivors = party.close()
    spent["open"] = cpu(lambda: answer.append(probe.receive(survivors[first])))
    return spent, len(to_bytes(masked[0]))


def flower_client(n: int, threshold: int, length: int) -> dict[str, float]:
    """CPU seconds of the same steps of Flower's client."""
    # Its package exports a function of the same name, so the module is asked for by its path.
    peer: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key

    setup = {
        Key.SAMPLE_NUMBER: n,
        Key.SHARE_NUMBER: n,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: 1000.0,
    }
    states = []
    for nid in range(n):
        states.append(peer.SecAggPlusState())
        states[-1].nid = nid
    keys: list[Any] = []
    spent = {"keys": cpu(lambda: keys.append(peer._setup(states[0], setup)))}
    keys += [peer._setup(state, setup) for state in states[1:]]
    public = {str(i): [k[Key.PUBLIC_KEY_1], k[Key.PUBLIC_KEY_2]] for i, k in enumerate(keys)}
    spent["share"] = cpu(lambda: peer._share_keys(states[0], public))
    sealed = []
    for state in states[1:]:  # what the others seal for client 0: one share each suffices
        shared = peer.generate_shared_key(
            peer.bytes_to_private_key(state.sk2), peer.bytes_to_public_key(keys[0][Key.PUBLIC_KEY_2])
        )
        sealed.append(peer.encrypt(shared, peer.share_keys_plaintext_concat(state.nid, 0, bytes(52), bytes(324))))
    parameters = ndarrays_to_parameters([np.random.default_rng(1).standard_normal(length, dtype=np.float32)])
    collect = {Key.CIPHERTEXT_LIST: sealed, Key.SOURCE_LIST: [state.nid for state in states[1:]]}
    spent["mask"] = cpu(lambda: peer._collect_masked_vectors(states[0], collect, 500, parameters))
    return spent


def clients(times: int) -> list[Row]:
    rows = []
    ours, theirs = [], []
    for _ in range(times):
        ours.append(our_client(20, LENGTH, 32)[0])
        theirs.append(flower_client(20, 13, LENGTH))
    mine, peer = (min(sum(one.values()) for one in many) for many in (ours, theirs))
    rows += [Row(f"client of 20, 1.7M: {step}", min(o[step] for o in ours) * 1e3, "ms") for step in ours[0]]
    rows += [
        Row("client of 20, 1.7M: all of it", mine * 1e3, "ms"),
        Row("the same, Flower", peer * 1e3, "ms"),
        Row("faster than Flower's client", peer / mine, "x", "at least 5", peer / mine >= 5),
    ]
    ours, theirs = [], []
    for _ in range(times):
        ours.append(our_client(100, 10, 32)[0])
        theirs.append(flower_client(100, 67, 10))
    signatures = cpu_of_signatures(200)
    mine = min(sum(one[step] for step in ("keys", "share", "take shares")) for one in ours)
    peer = min(one["keys"] + one["share"] for one in theirs)
    rows += [
        Row("keys and shares of 100, with 100 signatures verified", mine * 1e3, "ms"),
        Row("of which the signatures", 100 * signatures * 1e3, "ms"),
        Row("the same, Flower (verifies none)", peer * 1e3, "ms"),
        Row("faster than Flower's keys and shares", peer / mine, "x", "at least 50", peer / mine >= 50),
    ]
    for bits, most in ((32, 4.0), (24, 3.0)):
        size = our_client(3, LENGTH, bits)[1] / LENGTH
        rows.append(
            Row(f"upload, ring of {bits} bits", size, "B a parameter", f"at most {most:g}", round(size, 3) <= most)
        )
    return rows


def cpu_of_signatures(count: int) -> float:
    """CPU seconds of verifying one signature."""
    from fedlearn.secagg.primitives import sign, verified

    pair = new_identity(SUITE, os.urandom)
    signature = sign(SUITE, pair.secret, SUBJECT)
    return statistics.median(cpu(lambda: verified(SUITE, pair.public, signature, SUBJECT)) for _ in range(count))


def served(label: str, n: int, length: int, gone: int, target_s: float | None) -> list[Row]:
    party = Party(n, length)
    names = list(party.clients)
    party.serve({names[i * n // gone] for i in range(gone)})
    degree = party.terms.plan.parameters(n).degree
    opening, other = party.spent[Stage.OPEN], sum(party.spent.values()) - party.spent[Stage.OPEN]
    what = f"server, {label}, degree {degree}, {gone} dropped"
    return [
        Row(
            f"{what}: opening, CPU",
            opening,
            "s",
            f"under {target_s:g}" if target_s else "",
            opening < target_s if target_s else None,
        ),
        Row(f"{what}: all before it (signatures, folding), CPU", other, "s"),
    ]


def servers(*, quick: bool) -> list[Row]:
    rows = []
    with sparse_from(100):
        rows += served("100 clients, 1.7M", 100, LENGTH, 5, 1.0)
    if not quick:
        rows += served("100 clients, 1.7M", 100, LENGTH, 5, None)
        rows += served("1,000 clients, 100k", 1000, 100_000, 100, 3.0)
    return rows


def shown(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def page_rows(rows: list[Row]) -> list[str]:
    return [
        "| what | | unit | target | met |",
        "|---|---:|---|---|---|",
        *(
            f"| {r.what} | {shown(r.value)} | {r.unit} | {r.target} | {'' if r.met is None else 'yes' if r.met else 'no'} |"
            for r in rows
        ),
    ]


def machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "one machine")


def page(rows: list[Row]) -> str:
    lines = [
        "# Secure aggregation: CPU time of one round",
        "",
        f"`python -m benchmarks.secagg` on {cores()} cores of {machine()}. CPU seconds, the least of several that take turns with",
        "what they are compared with. Every sum was compared with the exact one, coordinate by coordinate.",
        "",
        *page_rows(rows),
        "",
        "Flower's client signs and verifies nothing and expands masks from 28 bits of seed; the comparison is with what it ships. The graph at 100",
        "clients is complete by default; degree 42 is what the formulas of the sparse graph give and is measured for comparison. Opening is spread",
        "over all cores; its CPU time is of all threads together.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the servers of complete 100 and of 1,000 clients")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/secagg.md")
    args = parser.parse_args()
    rows = [*masks(args.times), *clients(args.times), *servers(quick=args.quick)]
    print(json.dumps([r.__dict__ for r in rows], indent=1) if args.json else page(rows))
    if args.write:
        RESULTS.write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
