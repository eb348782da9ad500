"""What `fedlearn server` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CoordinatorOptions:
    """Options of a coordinator.

    Args:
        listen: `HOST:PORT`; port 0 binds any free port.
        state_dir: the coordinator's own folder; made when missing, locked while it runs.
        tls_dir: holds `ca.pem`, `cert.pem` and `key.pem` with the role server.
        app_dir: a Flower app folder; None for fedlearn's own app.
        database_url: a SQLAlchemy URL; None for `state.db` in the state folder.
        max_runs: runs that are worked on at a time; the others wait in order of submission.
        address_file: where the bound address is written once the port is open; for scripts that asked for port 0.
        json_logs: log JSON lines instead of text.
        debug: log more, and tracebacks.
    """

    listen: str
    state_dir: Path
    tls_dir: Path
    app_dir: Path | None = None
    database_url: str | None = field(default=None, repr=False)
    max_runs: int = 4
    address_file: Path | None = None
    json_logs: bool = False
    debug: bool = False
