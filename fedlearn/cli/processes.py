"""`fedlearn server` and `fedlearn client`: the two processes that stay."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli import certs
from fedlearn.cli.options import TLS_VARIABLE, AppFolder, Debug, Server, Tls
from fedlearn.cli.output import print_json
from fedlearn.errors import StateError, StudyError, TlsError

if TYPE_CHECKING:
    from collections.abc import Sequence

JsonLogs = Annotated[bool, typer.Option("--json-logs", help="Log JSON lines instead of text.")]


def server(
    listen: Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 for any.")],
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="The coordinator's own folder; made if missing.")
    ],
    tls: Tls = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that sites dial, for the development certificate; repeatable."),
    ] = None,
    app: AppFolder = None,
    database: Annotated[
        str | None,
        typer.Option(
            "--database", metavar="URL", envvar="FEDLEARN_DATABASE", help="SQLAlchemy URL; STATE/state.db without it."
        ),
    ] = None,
    max_runs: Annotated[int, typer.Option("--max-runs", min=1, help="Runs at a time; the others wait.")] = 4,
    address_file: Annotated[
        Path | None,
        typer.Option("--address-file", metavar="FILE", help="Write the bound HOST:PORT here once listening."),
    ] = None,
    json_logs: JsonLogs = False,
    debug: Debug = False,
) -> int:
    """The coordinator: accepts sites and runs, and stays.

    Without --tls it makes a development authority in STATE/tls on its first start, with a bundle for itself and one for an operator.
    """
    _one_thread()
    if tls is None:
        tls, made = certs.coordinator_bundles(state, host or ())
        if made:
            _say(f"made a development authority in {state / certs.AUTHORITY}: {certs.DEVELOPMENT_NOTICE}")
            _say(f"operators: fedlearn run STUDY --server {listen} --tls {state / certs.OPERATOR_BUNDLE}")
            _say(f"sites:     fedlearn certs issue NAME --state {state}")
    module, options = _app_module("server.coordinator"), _app_module("server.options")
    code: int = module.serve(
        options.CoordinatorOptions(
            listen=listen,
            state_dir=state,
            tls_dir=tls,
            app_dir=app,
            database_url=database,
            max_runs=max_runs,
            address_file=address_file,
            json_logs=json_logs,
            debug=debug,
        )
    )
    return code


def client(
    server: Server,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="The task that this site takes part in.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="The site's own file or folder; it never leaves.")
    ] = None,
    tls: Tls = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="DIR", help="The site's own folder; ~/.local/state/fedlearn/NAME without it."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="What this site admits, TOML; see docs/operating.md."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Most torch threads; the study decides.")
    ] = None,
    app: AppFolder = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Dry run: policy, certificates, data, device, budget and connection; then leave."),
    ] = False,
    study: Annotated[
        Path | None, typer.Option("--study", metavar="FILE", help="With --check: would this site admit the study?")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="With --check: print JSON. Otherwise: log JSON lines.")] = False,
    debug: Debug = False,
) -> int:
    """A site: dials out to the coordinator, and stays. Its data and raw updates never leave.

    The site's name is the one in its certificate.
    """
    _one_thread()
    folder = bundle(tls)
    module, options = _app_module("client.agent"), _app_module("client.options")
    asked = options.AgentOptions(
        server=server,
        tls_dir=folder,
        state_dir=state if state is not None else _default_state(folder, check),
        task=task,
        data=data,
        policy=policy,
        app_dir=app,
        device=device,
        threads=threads,
        json_logs=json,
        debug=debug,
        study=study,
    )
    if study is not None and not check:
        raise StudyError("client: --study without --check", hint="a site takes the studies that its coordinator sends")
    if check:
        return _show_findings(_app_module("client.check").check(asked), json)
    code: int = module.join(asked)
    return code


def bundle(tls: Path | None) -> Path:
    """The folder with certificates, from the option or the environment.

    Raises:
        TlsError: neither names one.
    """
    if tls is None:
        raise TlsError(
            "no certificate given: who are you?",
            hint=f"--tls DIR or {TLS_VARIABLE}=DIR; the coordinator's `fedlearn certs issue NAME --state DIR` makes one",
        )
    return tls


def _show_findings(findings: Sequence[Any], json: bool) -> int:
    code = next((finding.exit_code or 1 for finding in findings if not finding.ok), 0)
    if json:
        print_json({"ok": code == 0, "findings": [vars(finding) for finding in findings]})
        return code
    for finding in findings:
        print(f"{'ok    ' if finding.ok else 'FAILED'}  {finding.what:<12}{finding.detail}")
        if finding.hint and not finding.ok:
            print(f"        {'':<12}{finding.hint}")
    print("ready" if code == 0 else "not ready")
    return code


def _default_state(folder: Path, check: bool) -> Path:
    from fedlearn.link.tls import TlsBundle

    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fedlearn"
    try:
        return base / TlsBundle.load(folder).identity.name
    except TlsError:
        if check:  # the dry run reports the certificate itself, among everything else
            return base / "check"
        raise


def _app_module(name: str) -> Any:
    """A module of fedlearn's own app, which is found at run time: the library never imports it by name."""
    from fedlearn.app import load_app

    load_app()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise StateError(
            f"{name}: cannot be imported: {error}", hint="fedlearn's own app is missing from this installation"
        ) from None


def _one_thread() -> None:
    # Before torch is loaded, here and in the processes that this one starts: equal thread counts give equal bytes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)
