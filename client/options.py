"""What `fedlearn client` is told, and what `fedlearn client --check` finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AgentOptions:
    """Options of a site's agent. The client's name is the one in its certificate.

    Args:
        server: `HOST:PORT` of the coordinator.
        tls_dir: holds `ca.pem`, `cert.pem` and `key.pem` with the role client.
        state_dir: the agent's own folder (journal of releases); made when missing, locked while it runs.
        task: the task that this site takes part in, such as `hospital/heart`; None only with `app_dir`.
        data: the site's own file or folder; None for data that ships with the task.
        policy: the site's policy, TOML; None for the defaults (see `client.policy`).
        app_dir: somebody else's Flower app; None for fedlearn's own app. Its messages bypass the release gate.
        device: `auto`, `cpu` or `cuda:N`.
        threads: most torch threads of a worker; None lets the study decide.
        json_logs: log JSON lines instead of text.
        debug: log more, and tracebacks.
        study: of a dry run: would this site admit it?
    """

    server: str
    tls_dir: Path
    state_dir: Path
    task: str | None = None
    data: Path | None = None
    policy: Path | None = None
    app_dir: Path | None = None
    device: str = "auto"
    threads: int | None = None
    json_logs: bool = False
    debug: bool = False
    study: Path | None = None


@dataclass(frozen=True)
class Finding:
    """One line of a dry run.

    Args:
        what: what was checked: `policy`, `tls`, `data`, `device`, `budget`, `study` (where one is named), `connection`.
        ok: whether it will work.
        detail: what was found, or what is wrong.
        hint: what to do about it.
        exit_code: 0, or the code of the error behind it.
    """

    what: str
    ok: bool
    detail: str
    hint: str = ""
    exit_code: int = 0
