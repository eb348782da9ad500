"""Seconds per round of an echo app: a coordinator and three clients, each its own process, over mutual TLS on loopback.

Beside it, in the same run: the raw limit (the same bytes over plain TLS sockets, same processes, nothing else), and stock
Flower's SuperLink and SuperNodes with the same app (without TLS, which favours Flower). Every size gets fresh processes, so
that the server's peak memory belongs to it alone.

    python -m benchmarks.link [--no-flower] [--sizes 1000,7000000,100000000] [--rounds 9] [--json] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "link.md"
SIZES = (1_000, 7_000_000, 100_000_000)
TARGETS_S = {1_000: 0.020, 7_000_000: 0.150, 100_000_000: 1.5}
TARGETS_FLOWER = {1_000: 300, 7_000_000: 80, 100_000_000: 20}
TARGET_MB = 600
CLIENTS = 3
TENSORS = 10
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def echo_rounds(grid, node_ids, size, rounds):
    """The echo app's rounds, the same on our grid and on Flower's: seconds of each."""
    import numpy as np
    from flwr.app import ArrayRecord, Message, RecordDict

    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, max(1, size // TENSORS), dtype=np.uint8) for _ in range(TENSORS)]
    content = RecordDict({"model": ArrayRecord(parts)})
    del parts
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        replies = list(grid.send_and_receive([Message(content, node_id, "train") for node_id in node_ids]))
        seconds.append(time.perf_counter() - began)
        check(content, replies, len(node_ids))
        del replies
    return seconds


def check(content, replies, count):
    """Every client sent every byte back."""
    assert len(replies) == count
    for reply in replies:
        assert not reply.has_error(), reply.error
        for name, array in content["model"].items():
            assert reply.content["model"][name].data == array.data


# Our link.


async def serve(folder: Path, size: int, rounds: int) -> dict:
    from fedlearn.link import LinkServer, TlsBundle

    server = LinkServer("127.0.0.1:0", TlsBundle.load(folder / "server"))
    say(address=await server.start())
    grid = server.grid(1)

    def app():
        node_ids = grid.wait_nodes(CLIENTS, 60)
        assert len(node_ids) == CLIENTS
        # One round to warm up: imports, connections' windows, the allocator.
        return echo_rounds(grid, node_ids, size, rounds + 1)[1:]

    seconds = await asyncio.to_thread(app)
    await server.stop()
    return {"seconds": seconds, "peak_mb": peak_mb()}


async def answer(folder: Path, address: str, name: str) -> None:
    from flwr.app import Message

    from fedlearn.link import LinkClient, TlsBundle

    async def echo(message):
        return Message(message.content, reply_to=message)

    await LinkClient(address, TlsBundle.load(folder / name), echo).run()


# The raw limit.


def context_of(folder: Path, name: str, purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.load_cert_chain(folder / name / "cert.pem", folder / name / "key.pem")
    context.load_verify_locations(folder / name / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def read_exactly(connection: ssl.SSLSocket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = connection.recv_into(view[done:])
        if not got:
            raise EOFError
        done += got


def raw_serve(folder: Path, size: int, rounds: int) -> dict:
    context = context_of(folder, "server", ssl.PROTOCOL_TLS_SERVER)
    listener = socket.create_server(("127.0.0.1", 0))
    say(address=f"127.0.0.1:{listener.getsockname()[1]}")
    data = os.urandom(size)
    barrier = threading.Barrier(CLIENTS + 1)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(context.wrap_socket(listener.accept()[0], server_side=True)) for _ in range(CLIENTS)
        ]

        def one(connection):
            back = bytearray(size)
            for _ in range(rounds + 1):
                barrier.wait()
                connection.sendall(data)
                read_exactly(connection, memoryview(back))
                barrier.wait()
                assert back == data

        threads = [threading.Thread(target=one, args=(connection,)) for connection in connections]
        for thread in threads:
            thread.start()
        seconds = []
        for _ in range(rounds + 1):
            barrier.wait()
            began = time.perf_counter()
            barrier.wait()
            seconds.append(time.perf_counter() - began)
        for thread in threads:
            thread.join()
    return {"seconds": seconds[1:], "peak_mb": peak_mb()}


def raw_answer(folder: Path, address: str, name: str, size: int) -> None:
    host, port = address.split(":")
    context = context_of(folder, name, ssl.PROTOCOL_TLS_CLIENT)
    with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as connection:
        data = bytearray(size)
        try:
            while True:
                read_exactly(connection, memoryview(data))
                connection.sendall(data)
        except EOFError:
            return


# Processes.


def say(**values) -> None:
    print(json.dumps(values), flush=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def role(arguments: list[str], *, huge_pages: bool = False, **popen) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    if huge_pages:
        environment["GLIBC_TUNABLES"] = HUGE_PAGES
    command = [sys.executable, "-m", "benchmarks.link", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **popen)


def measure(kind: str, folder: Path, size: int, rounds: int, *, huge_pages: bool = False) -> dict:
    """One server process and three client processes; the server's figures."""
    common = ["--folder", str(folder), "--sizes", str(size), "--rounds", str(rounds)]
    server = role(["--role", f"{kind}-server", *common], huge_pages=huge_pages, stdout=subprocess.PIPE)
    address = json.loads(server.stdout.readline())["address"]
    clients = [
        role(
            ["--role", f"{kind}-client", "--address", address, "--name", f"client-{i}", *common],
            huge_pages=huge_pages,
            stderr=subprocess.DEVNULL,
        )
        for i in range(CLIENTS)
    ]
    try:
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the {kind} server ended with exit code {server.wait()}")
        return json.loads(line)
    finally:
        for process in (*clients, server):
            process.terminate()
            process.wait()


def certificates(folder: Path) -> None:
    from fedlearn.link import Role, create_authority, issue

    create_authority(folder / "ca")
    issue(folder / "ca", "server", Role.SERVER, folder / "server")
    for i in range(CLIENTS):
        issue(folder / "ca", f"client-{i}", Role.CLIENT, folder / f"client-{i}")


def run_role(args: argparse.Namespace) -> None:
    size = args.sizes[0]
    match args.role:
        case "link-server":
            say(**asyncio.run(serve(args.folder, size, args.rounds)))
        case "link-client":
            asyncio.run(answer(args.folder, args.address, args.name))
        case "raw-server":
            say(**raw_serve(args.folder, size, args.rounds))
        case "raw-client":
            raw_answer(args.folder, args.address, args.name, size)


# The report.


def human(size: int) -> str:
    return f"{size // 1_000_000} MB" if size >= 1_000_000 else f"{size // 1_000} KB"


def report(rows: list[dict]) -> str:
    lines = [
        "| payload | s per round | target | with huge pages | server peak | raw TLS | ratio to raw | stock Flower | faster than Flower | target |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size, flower = row["size"], row.get("flower_s")
        target, factor = TARGETS_S.get(size), TARGETS_FLOWER.get(size)
        lines.append(
            f"| {human(size)} | {row['link_s']:.4f} | {target or '-'} | {row['huge_s']:.4f} | {row['peak_mb']:.0f} MB | {row['raw_s']:.4f} |"
            f" {row['link_s'] / row['raw_s']:.1f}x |"
            + (f" {flower:.1f} | {flower / row['link_s']:.0f}x |" if flower else " not run | |")
            + f" {f'{factor}x' if factor else '-'} |"
        )
    return "\n".join(lines)


def page(rows: list[dict], rounds: int, flower_rounds: int) -> str:
    flower_mb = rows[0].get("flower_superlink_mb")
    return "\n".join(
        [
            "# The link: seconds per round of an echo app",
            "",
            (
                f"`python -m benchmarks.link`: a server and {CLIENTS} client processes on one {os.cpu_count()}-core"
                f" {platform.machine()} VM, mutual TLS on loopback, each model in {TENSORS} tensors. Medians of {rounds}"
                f" rounds after one to warm up; Flower {flower_rounds} rounds, without TLS, runtime installs off. Every byte"
                " that comes back is compared."
            ),
            "",
            report(rows),
            "",
            (
                f"Targets: the times and ratios above, and {TARGET_MB} MB at 100 MB payload."
                " The server's peak holds the model, all replies at once (Flower's `send_and_receive` returns a list) and the"
                " program itself. Raw TLS is `ssl` sockets with one thread a client, the same processes, no checksum."
            ),
            f'"With huge pages": every process started with `GLIBC_TUNABLES={HUGE_PAGES}`, which the other columns do not use.',
            *([f"Flower's SuperLink alone peaked at {flower_mb:.0f} MB over the whole run."] if flower_mb else []),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [int(s) for s in text.split(",")], default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flower", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--flower-rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/link.md")
    for hidden in ("--role", "--address", "--name"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        run_role(args)
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        certificates(folder)
        for size in args.sizes:
            raw = measure("raw", folder, size, args.rounds)
            link = measure("link", folder, size, args.rounds)
            huge = measure("link", folder, size, args.rounds, huge_pages=True)
            rows.append(
                {
                    "size": size,
                    "link_s": statistics.median(link["seconds"]),
                    "link_all_s": link["seconds"],
                    "huge_s": statistics.median(huge["seconds"]),
                    "peak_mb": link["peak_mb"],
                    "raw_s": statistics.median(raw["seconds"]),
                }
            )
            print(f"{human(size)}: {rows[-1]['link_s']:.4f} s", file=sys.stderr, flush=True)
        if args.flower:
            from benchmarks.link_flower import measure_flower

            found = measure_flower(folder / "flower", args.sizes, args.flower_rounds)
            for row in rows:
                row["flower_s"] = statistics.median(found["seconds"][str(row["size"])])
                row["flower_superlink_mb"] = found["superlink_mb"]
    print(json.dumps(rows) if args.json else report(rows))
    if args.write:
        RESULTS.write_text(page(rows, args.rounds, args.flower_rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
