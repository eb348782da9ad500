"""`fedlearn secagg`: what secure aggregation would cost and withstand, before a study asks for it."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from fedlearn.cli.options import Debug, Json
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import StudyError

if TYPE_CHECKING:
    from fedlearn.secagg.estimate import Estimate


class ProfileName(StrEnum):
    """Profiles as the command line names them."""

    semi_malicious = "semi-malicious"
    malicious = "malicious"


class SuiteName(StrEnum):
    """Suites as the command line names them."""

    aes = "x25519-aes256"
    chacha = "x25519-chacha20"
    p256 = "p256-aes256"


def plan(
    clients: Annotated[int, typer.Option("--clients", help="Clients in a round.")],
    parameters: Annotated[float, typer.Option("--parameters", help="Coordinates of an update, such as 1.7e6.")],
    adversarial: Annotated[
        float, typer.Option("--adversarial", help="Fraction of clients that may collude with the server.")
    ] = 0.1,
    dropout: Annotated[float, typer.Option("--dropout", help="Fraction of clients that may vanish.")] = 0.1,
    profile: Annotated[
        ProfileName, typer.Option("--profile", help="What is assumed of the server.")
    ] = ProfileName.semi_malicious,
    suite: Annotated[SuiteName, typer.Option("--suite", help="Primitives.")] = SuiteName.aes,
    ring_bits: Annotated[int, typer.Option("--ring-bits", help="16, 24 or 32: bits of a coordinate on the wire.")] = 32,
    value_bits: Annotated[
        int, typer.Option("--value-bits", help="Bits of one client's coordinate; 0: all that fit.")
    ] = 0,
    weight_cap: Annotated[int, typer.Option("--weight-cap", help="The largest weight of a client.")] = 1,
    clip: Annotated[float, typer.Option("--clip", help="L2 norm that an update is clipped to.")] = 1.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print graph, threshold, bits, bytes, times on this machine, and how many colluding clients learn what."""
    del debug
    from fedlearn.secagg.estimate import estimate
    from fedlearn.secagg.plan import Plan, Profile
    from fedlearn.secagg.primitives import Suite
    from fedlearn.secagg.quantize import Encoding

    if not 1 <= parameters <= 2**31 or parameters != int(parameters):
        raise StudyError(f"parameters: got {parameters:g}, expected a whole number from 1 to 2**31")
    encoding = Encoding(int(parameters), clients, clip, ring_bits, value_bits, weight_cap)
    found = estimate(
        Plan(
            encoding,
            adversarial=adversarial,
            dropout=dropout,
            suite=Suite[suite.value.upper().replace("-", "_")],
            profile=Profile[profile.value.upper().replace("-", "_")],
        )
    )
    if json:
        parts = {name: asdict(getattr(found, name)) for name in ("parameters", "sizes", "seconds", "coalitions")}
        bits = {"ring": encoding.ring_bits, "value": encoding.value_bits, "step": 1 / encoding.scale}
        print_json({**parts, "bits": bits, "dropouts": found.dropouts, "exchanges": found.exchanges})
        return
    print_table(_rows(found), ("secure aggregation", ""))
    print(
        "\nTimes are CPU time on this machine, one thread. The sum itself is not protected: see docs/secure-aggregation.md."
    )


def _rows(found: Estimate) -> list[tuple[str, str]]:
    from fedlearn.secagg.masks import cores

    p, e, s, t, c = found.parameters, found.plan.encoding, found.sizes, found.seconds, found.coalitions
    graph = "complete: everyone with everyone" if p.complete else f"random, {p.degree} neighbours each"
    ratio = s.up / s.plain
    around = "" if p.complete else " around which they are"
    lying = "" if found.plan.agrees(p.clients) else "; lying about dropouts, over two of them at the least"
    return [
        ("graph", graph),
        ("shares that open a mask", f"{p.threshold} of {p.holders}"),
        ("clients that may drop out", f"{found.dropouts} of {p.clients}"),
        ("exchanges besides the update's own", str(found.exchanges)),
        ("ring", f"{e.ring_bits} bits a coordinate, {e.value_bits} of one client's, step {1 / e.scale:.3g}"),
        ("sent by a client", f"{_size(s.up)} ({ratio:.2f} of float32; masked vector {_size(s.vector)})"),
        ("received by a client", f"{_size(s.down)} besides the model"),
        ("client, before its update is ready", _time(t.client_keys)),
        ("client, with its update", _time(t.client_mask)),
        (
            "server, to open the sum",
            f"{_time(t.server_open)}; about {_time(t.server_open / cores())} on {cores()} cores",
        ),
        ("server and no client", "learns the sum, and who took part"),
        (f"server and up to {_clients(c.allowed)}", "learn the sum of the others' updates" + lying),
        (f"server and {_clients(c.lying)}, lying", "may read every update" + around),
        (f"server and {_clients(c.looking)}, looking", "may read every update" + around),
        (f"{p.clients - 1} clients, no server", "learn the last one's update from the sum alone"),
    ]


def _clients(count: int) -> str:
    return f"{count} client" if count == 1 else f"{count} clients"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _time(value: float) -> str:
    shown, unit = (value, "s") if value >= 1 else (value * 1e3, "ms")
    return f"{shown:.2g} {unit}" if shown < 10 else f"{shown:.0f} {unit}"
