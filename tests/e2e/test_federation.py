"""The README's federation, command by command, with processes that stay."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest

import fedlearn
from fedlearn import arrays
from fedlearn.cli.demo import split_by_hospital
from fedlearn.report.folder import RunFolder
from tests.support.processes import Family, Logged, family, free_ports
from tests.test_readme import README, blocks

ROOT = Path(__file__).resolve().parents[2]
FEDLEARN = (sys.executable, "-m", "fedlearn.cli")
STAYS = {"server", "client"}

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def readme_commands(port: int) -> list[list[str]]:
    """The README's federation, on a port that is free here."""
    lines = [line for body in blocks(README, "console", "federation") for line in body.splitlines()]
    return [shlex.split(line[2:].replace("9443", str(port))) for line in lines]


def start(processes: Family, command: list[str]) -> Logged:
    assert command[0] == "fedlearn"
    return processes.start(*FEDLEARN, *command[1:])


@pytest.fixture
def processes(tmp_path):
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations")
    for name, (path, _) in split_by_hospital(tmp_path / "hospitals").items():
        shutil.copy(path, tmp_path / f"{name}.csv")
    with family(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as found:
        yield found


def test_the_readmes_federation(processes, tmp_path):
    (port,) = free_ports(1)
    stay: list[Logged] = []
    for command in readme_commands(port):
        logged = start(processes, command)
        if command[1] in STAYS and "--check" not in command:
            stay.append(logged)
            if command[1] == "server":
                logged.wait_for(str(port), timeout_s=60)
                logged.wait_for("(?i)listening", timeout_s=60)
        else:
            assert logged.wait(120) == 0, logged.output
        if "--check" in command:
            assert logged.output.splitlines()[-1] == "ready"
        if command[1] == "runs":
            assert "finished" in logged.output
        if command[1] == "nodes":
            assert {line.split()[0] for line in logged.output.splitlines()[1:]} == {"cleveland", "hungary"}
    assert RunFolder(tmp_path / "heart-model").study().rounds == 3
    for logged in reversed(stay):
        logged.process.send_signal(signal.SIGTERM)
        assert logged.wait(30) == 0, logged.output
        assert "Traceback" not in logged.output
    assert processes.alive() == []


def test_the_federation_of_two_is_the_simulation_of_two(processes, tmp_path):
    """The same rows, named by a client column, give the same bytes in one process."""
    import csv

    (port,) = free_ports(1)
    for command in readme_commands(port):
        logged = start(processes, command)
        if command[1] == "server":
            logged.wait_for("(?i)listening", timeout_s=60)
        elif command[1] != "client" or "--check" in command:
            assert logged.wait(120) == 0, logged.output
    rows = []
    for name in ("cleveland", "hungary"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            rows += [{**row, "dataset": name} for row in csv.DictReader(file)]
    with (tmp_path / "both.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    simulated = fedlearn.simulate("simulations/heart.toml", rounds=3, data=tmp_path / "both.csv")
    assert arrays.digest(RunFolder(tmp_path / "heart-model").weights()) == arrays.digest(simulated.weights)


def test_a_live_view_outlives_the_coordinator(processes, tmp_path):
    (port,) = free_ports(1)
    commands = readme_commands(port)
    server = start(processes, commands[0])
    server.wait_for("(?i)listening", timeout_s=60)
    for command in commands[1:]:
        if command[1] == "certs":
            assert start(processes, command).wait(60) == 0
        elif command[1] == "client" and "--check" not in command:
            start(processes, command)
    run = next(c for c in commands if c[1] == "run")
    run[run.index("--rounds") + 1] = "200"
    watched = start(processes, run)
    watched.wait_for(r"^\s+5\s+2\s", timeout_s=60)
    server.process.kill()
    server.wait(30)
    again = start(processes, commands[0])
    again.wait_for("(?i)listening", timeout_s=60)
    assert watched.wait(240) == 0, watched.output
    rows = [int(line.split()[0]) for line in watched.output.splitlines() if line[:7].strip().isdigit()]
    # Killed between a round's commit and its event, that one row is lost; none comes twice or out of order.
    assert rows == sorted(set(rows))
    assert (rows[-1], len(rows) >= 199) == (200, True)
    assert "resumed after round" in watched.output
    assert RunFolder(tmp_path / "heart-model").study().rounds == 200


def test_ctrl_c_stops_a_server_and_a_client_with_one_line(processes, tmp_path):
    (port,) = free_ports(1)
    commands = readme_commands(port)
    server = start(processes, commands[0])
    server.wait_for("(?i)listening", timeout_s=60)
    assert start(processes, commands[1]).wait(60) == 0
    client = start(processes, next(c for c in commands if c[1] == "client" and "--check" not in c))
    client.wait_for("(?i)connected", timeout_s=60)
    for logged in (client, server):
        logged.process.send_signal(signal.SIGINT)
        assert logged.wait(30) == 130, logged.output
        assert "Traceback" not in logged.output
    assert processes.alive() == []


def test_a_port_in_use_a_state_in_use_and_a_strangers_certificate(processes, tmp_path):
    (port, other) = free_ports(2)
    commands = readme_commands(port)
    server = start(processes, commands[0])
    server.wait_for("(?i)listening", timeout_s=60)
    listen = f"127.0.0.1:{port}"
    taken = processes.start(*FEDLEARN, "server", "--listen", listen, "--state", "second")
    assert (taken.wait(60), "in use" in taken.output) == (9, True), taken.output
    locked = processes.start(*FEDLEARN, "server", "--listen", f"127.0.0.1:{other}", "--state", "coordinator")
    assert (locked.wait(60), "in use by" in locked.output) == (12, True), locked.output
    stranger = ("--tls", "second/tls/operator", "--server", listen)
    refused = processes.start(*FEDLEARN, "runs", *stranger)
    assert (refused.wait(60), "certificate" in refused.output) == (6, True), refused.output
    assert start(processes, ["fedlearn", "certs", "issue", "cleveland", "--state", "second"]).wait(60) == 0
    client = processes.start(
        *(*FEDLEARN, "client", "--server", listen, "--tls", "second/tls/clients/cleveland"),
        *("--task", "hospital/heart", "--data", "cleveland.csv", "--state", "c"),
    )
    assert (client.wait(60), "certificate" in client.output) == (6, True), client.output
    for logged in (taken, locked, refused, client):
        assert "Traceback" not in logged.output


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (("--data", "nowhere.csv"), 4, "nowhere.csv"),
        (("--data", "simulations/heart.toml"), 4, "heart.toml"),
        (("--task", "hospital/hart"), 3, "hospital/heart"),
        (("--device", "cuda:9"), 14, "cuda:9"),
        (("--tls", "nowhere"), 6, "nowhere"),
        (("--policy", "nowhere.toml"), None, "nowhere.toml"),
    ],
)
def test_the_dry_run_says_what_is_wrong(processes, tmp_path, change, code, says):
    (port,) = free_ports(1)
    commands = readme_commands(port)
    server = start(processes, commands[0])
    server.wait_for("(?i)listening", timeout_s=60)
    assert start(processes, commands[1]).wait(60) == 0
    check = next(c for c in commands if "--check" in c)
    if change[0] in check:
        check[check.index(change[0]) + 1] = change[1]
    else:
        check += change
    logged = start(processes, check)
    got = logged.wait(60)
    assert got == code or (code is None and got > 2), logged.output
    assert says in logged.output
    assert logged.output.splitlines()[-1] == "not ready"
    assert "Traceback" not in logged.output
