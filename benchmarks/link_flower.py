"""The same echo app on stock Flower: a SuperLink and three SuperNodes on loopback, insecure, runtime installs off."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
CLIENTS = 3
PATIENCE_S = 900

PYPROJECT = """
[project]
name = "echo"
version = "1.0.0"
description = "Sends back what it gets"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "fedlearn"

[tool.flwr.app.components]
serverapp = "echo.server:app"
clientapp = "echo.client:app"

[tool.flwr.app.config]
sizes = ""
rounds = 2
out = ""
"""

SERVER = """
import json, time
from flwr.serverapp import ServerApp
from benchmarks.link import CLIENTS, echo_rounds

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    while len(node_ids := list(grid.get_node_ids())) < CLIENTS:
        time.sleep(0.5)
    seconds = {size: echo_rounds(grid, node_ids, int(size), int(config["rounds"])) for size in config["sizes"].split(",")}
    with open(config["out"], "w") as file:
        json.dump(seconds, file)
"""

CLIENT = """
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    return Message(message.content, reply_to=message)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(path: Path, text: str, count: int = 1, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while len(re.findall(re.escape(text), path.read_text())) < count:
        if time.monotonic() > end:
            raise TimeoutError(f"no {count} x {text!r} in:\n{path.read_text()[-3000:]}")
        time.sleep(0.2)


def measure_flower(folder: Path, sizes: list[int], rounds: int) -> dict:
    """Seconds of each round by size, and the SuperLink's peak memory in MB."""
    app, home, out = folder / "app", folder / "home", folder / "seconds.json"
    (app / "echo").mkdir(parents=True)
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "echo" / "__init__.py").write_text("")
    (app / "echo" / "server.py").write_text(SERVER)
    (app / "echo" / "client.py").write_text(CLIENT)
    port = free_port()
    (home / ".flwr").mkdir(parents=True)
    (home / ".flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n\n[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    processes: list[subprocess.Popen] = []

    def start(name: str, *command: str, **more: str) -> Path:
        log = folder / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                cwd=app,
                env=environment | more,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.append(process)
        return log

    try:
        link = start(
            "superlink",
            *("flower-superlink", "--insecure", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        wait_for(link, "Uvicorn running on")
        for i in range(CLIENTS):
            start(
                f"node-{i}",
                *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())),
                FLWR_HOME=str(folder / f"node-{i}"),
            )
        wait_for(link, "Activated node_id", CLIENTS)
        config = f'sizes="{",".join(map(str, sizes))}" rounds={rounds} out="{out}"'
        run = start("run", "flwr", "run", ".", "--stream", "--run-config", config)
        code = processes[-1].wait(PATIENCE_S)
        if code or not out.exists():
            raise RuntimeError(f"flwr run ended with {code}:\n{run.read_text()[-3000:]}\n{link.read_text()[-3000:]}")
        return {"seconds": json.loads(out.read_text()), "superlink_mb": peak_mb(processes[0].pid)}
    finally:
        for process in reversed(processes):
            stop(process)


def peak_mb(pid: int) -> float:
    """The kernel's high-water mark of one process."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def stop(process: subprocess.Popen) -> None:
    """End a process and what it started: it leads a session of its own."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
