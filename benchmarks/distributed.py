"""Noise that clients add together: what drawing it, encoding and taking surplus off cost, and the bytes that it takes.

CPU seconds of one core, each the least of several that take turns; numpy's generators draw the same distributions. Bytes and prices are of plans.

    python -m benchmarks.distributed [--times 5] [--json] [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

from benchmarks.secagg import LENGTH, Row, cpu, least, machine, page_rows, raw_cipher
from fedlearn.privacy import accounting
from fedlearn.privacy.distributed import DistributedPlan
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.secagg.noise import Noise, add_noise, table_of
from fedlearn.secagg.plan import Profile
from fedlearn.secagg.primitives import Suite
from fedlearn.secagg.quantize import Encoding
from fedlearn.secagg.rotation import rotated, unrotated

RESULTS = Path(__file__).parent / "results" / "distributed.md"
DELTA, ROUNDS = 1e-5, 100


def samplers(times: int) -> list[Row]:
    rows = []
    vector, key = np.zeros(LENGTH, dtype="<u4"), bytes(32)
    random = np.random.default_rng(1)
    for deviation in (10, 1_000, 10_000):
        variance = float(deviation) ** 2
        add_noise(vector, Noise.SKELLAM, variance, key)
        ours, raw, peer = least(
            times,
            lambda v=variance: add_noise(vector, Noise.SKELLAM, v, key),
            raw_cipher(Suite.X25519_AES256, 8 * LENGTH),
            lambda v=variance: random.poisson(v / 2, LENGTH) - random.poisson(v / 2, LENGTH),
        )
        what = f"Skellam, deviation {deviation:,}"
        rows += [
            Row(f"{what}: drawn and added", LENGTH / ours / 1e6, "M/s"),
            Row(f"{what}: numpy's, not from a cipher", LENGTH / peer / 1e6, "M/s"),
            Row(f"{what}: faster than numpy", peer / ours, "x", "at least 5", peer / ours >= 5),
            Row(f"{what}: share of the raw cipher's speed", raw / ours, "x"),
        ]
    table_of(Noise.DISCRETE_GAUSSIAN, 1e6)
    (gaussian,) = least(times, lambda: add_noise(vector, Noise.DISCRETE_GAUSSIAN, 1e6, key))
    rows.append(Row("discrete Gaussian, deviation 1,000", LENGTH / gaussian / 1e6, "M/s"))
    for deviation in (1_000, 10_000, 32_000):
        built = cpu(lambda d=deviation: table_of.__wrapped__(Noise.SKELLAM, float(d) ** 2))
        rows.append(Row(f"a table of deviation {deviation:,}, once a run", built * 1e3, "ms"))
    return rows


def encoding(times: int) -> list[Row]:
    plan = DistributedPlan(LENGTH, 100, 80, 1.0, 1.0, profile=Profile.MALICIOUS, levels=(100,))
    bare = DistributedPlan(LENGTH, 100, 80, 1.0, 1.0, profile=Profile.MALICIOUS)
    plain = Encoding(LENGTH, 100, 1.0)
    update, key = np.random.default_rng(1).standard_normal(LENGTH, dtype=np.float32), bytes(32)
    vector = bare.encode(update, key, os.urandom)
    plan.encode(update, key, os.urandom, key)
    whole, split, simple, turn = least(
        times,
        lambda: bare.encode(update, key, os.urandom),
        lambda: plan.encode(update, key, os.urandom, key),
        lambda: plain.encode(update, 1, key),
        lambda: rotated(update, key),
    )
    total = bare.encoding.decode(vector)
    values = total.integers / bare.encoding.scale
    back, removed = least(
        times,
        lambda: unrotated(values, key),
        lambda: plan.surplus.remove(vector[:-1], 100, [key] * 10),
    )
    return [
        Row("rotation of 1.7M float32", turn * 1e3, "ms"),
        Row("encoding of 1.7M: rotate, clip, round, noise", whole * 1e3, "ms"),
        Row("the same with a surplus level", split * 1e3, "ms"),
        Row("encoding without rotation and noise", simple * 1e3, "ms"),
        Row("rotation back, float64", back * 1e3, "ms"),
        Row("surplus taken off, a client and level", removed * 100, "ms"),
    ]


def prices() -> list[str]:
    lines = [
        f"| numbers | clients | honest | noise | ring | bytes a number | epsilon, {ROUNDS} rounds | of Gaussian noise |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for length in (2**17, LENGTH, 2**25):
        for clients, noise in ((10, 2.0), (10, 8.0), (100, 2.0), (100, 8.0), (1000, 8.0)):
            plan = DistributedPlan(length, clients, clients * 8 // 10, 1.0, noise, profile=Profile.MALICIOUS)
            epsilon = plan.epsilon(ROUNDS, DELTA).reported.epsilon
            clipped = (
                noise * plan.encoding.norm_bound / plan.encoding.scale
            )  # against the clip, as Gaussian noise would be
            gaussian = accounting.rdp_epsilon(Cost(Repeated(Gaussian(clipped), ROUNDS)), DELTA)
            lines.append(
                f"| {length:,} | {clients} | {plan.honest} | {noise:g} | {plan.encoding.ring_bits} |"
                f" {plan.upload_bytes_a_number:.3f} | {epsilon:.4f} | {gaussian:.4f} |"
            )
    return lines


def page(rows: list[Row]) -> str:
    return "\n".join(
        [
            "# Distributed noise: CPU time of one core, bytes and prices",
            "",
            f"`python -m benchmarks.distributed` on one core of {machine()}.",
            "",
            *page_rows(rows),
            "",
            "The fewest survivors are eight tenths of the clients, a tenth collude, the survivors are agreed upon (malicious profile); delta 1e-5. The last",
            "column is what Gaussian noise of the same size on the clipped update without rounding would cost.",
            "",
            *prices(),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/distributed.md")
    args = parser.parse_args()
    rows = [*samplers(args.times), *encoding(args.times)]
    text = page(rows)
    print(json.dumps([r.__dict__ for r in rows], indent=1) if args.json else text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
