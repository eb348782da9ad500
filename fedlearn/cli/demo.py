"""`fedlearn demo`: four real hospitals, each its own process with its own file, train one model over mutual TLS on this machine.

Each hospital's patients are protected by differential privacy, and its update leaves it under masks, so that the coordinator reads sums alone.
"""

from __future__ import annotations

import csv
import dataclasses
import json as jsonlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer

from fedlearn import events
from fedlearn.cli.options import Debug, Json, Rounds
from fedlearn.cli.output import print_json, print_table
from fedlearn.cli.view import RunView
from fedlearn.errors import INTERRUPTED_EXIT_CODE, LinkError, RunFailedError, StateError
from fedlearn.report import seen

if TYPE_CHECKING:
    from fedlearn.privacy.ledger_file import AccountState
    from fedlearn.report.comparison import Comparison

STUDY: Final = "simulations/heart_private.toml"
PLAIN_STUDY: Final = "simulations/heart.toml"
TASK: Final = "hospital/heart"
DATA_SET: Final = "heart-disease"
SEEN: Final = "seen.png"
POLICY: Final = f"""\
# What this hospital takes part in, whatever a coordinator asks; see docs/privacy.md.
dataset = "{DATA_SET}"

[budgets.record]
epsilon = 3
delta = 1e-5
rule = "fixed" # every charge is of one kind, so the exact accountant may add them up
"""
START_S: Final = 60.0
STOP_S: Final = 10.0
_POLL_S: Final = 0.05


def demo(
    rounds: Rounds = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything goes; replaced.")] = Path(
        "demo-run"
    ),
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Without privacy and masks: then a simulation gives the same model, byte for byte."
        ),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Four real hospitals train one model, each in its own process with its own data, over mutual TLS on this machine.

    Every patient is protected by differential privacy, and the coordinator reads sums of masked updates alone. Ends with what each
    hospital's ledger says was spent, what the coordinator saw of one hospital, and each hospital's AUC when it trains alone, in the
    federation, and when all data lies in one place.
    """
    del debug
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = _fresh(out)
    say = _silent if json else _say
    view = RunView(rows=not json)
    setting = _Setting(PLAIN_STUDY if plain else STUDY, rounds, folder, private=not plain)
    try:
        with ExitStack() as stack:
            result = _federate(setting, view, stack, say)
    except KeyboardInterrupt:
        print("interrupted; the coordinator and the hospitals are stopped", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    ledgers = _ledgers(setting)
    if view.opened is not None:
        seen.plot(view.opened, view.round_rows[-1]["clients"], folder / SEEN)
    say("\ncomparing: each hospital alone, and all data in one place ...")
    comparison = _compare(setting, result.weights)
    if json:
        print_json(_report(setting, comparison, result, view, ledgers))
    else:
        _print(setting, comparison, ledgers, view)
    if comparison.identical is False:
        raise RunFailedError("the simulation's weights differ from the federation's, expected the same bytes")
    return 0


@dataclass(frozen=True)
class _Setting:
    """What the demo was asked for."""

    study: str
    rounds: int | None
    folder: Path
    private: bool

    @property
    def overrides(self) -> tuple[str, ...]:
        # A hospital that cannot start ends the demo in a minute, not in ten.
        return ("runtime.wait_s=60", *(() if self.rounds is None else (f"rounds={self.rounds}",)))

    def home(self, hospital: str) -> Path:
        return self.folder / "hospitals" / hospital


@dataclass(frozen=True)
class _Result:
    run: str
    weights: bytes
    seconds: float


def _federate(setting: _Setting, view: RunView, stack: ExitStack, say: Any) -> _Result:
    from fedlearn.app import load_app
    from fedlearn.cli import certs
    from fedlearn.cli.fetch import fetch
    from fedlearn.cli.runs import connect, follow
    from fedlearn.link import tls

    folder = setting.folder
    state = folder / "coordinator"
    files = split_by_hospital(folder / "hospitals")
    say(f"{len(files)} hospitals, each with its own file and nothing else:")
    for name, (path, count) in files.items():
        say(f"  {name:<15}{count:>4} patients  {path}")
    certs.coordinator_bundles(state, ())
    for name in files:
        tls.issue(state / certs.AUTHORITY, name, tls.Role.CLIENT, folder / "hospitals" / name / "tls")
    children = stack.enter_context(Children(folder / "logs"))
    where = folder / "address"
    children.start(
        "coordinator", "server", "--listen", "127.0.0.1:0", "--state", str(state), "--address-file", str(where)
    )
    address = children.wait_for_file(where)
    say(f"\ncoordinator at {address}, mutual TLS with a development authority")
    for name, (path, _) in files.items():
        home = setting.home(name)
        policy: tuple[str, ...] = ()
        if setting.private:
            (home / "policy.toml").write_text(POLICY)
            policy = ("--policy", str(home / "policy.toml"))
        children.start(
            name,
            *("client", "--server", address, "--tls", str(home / "tls"), "--state", str(home / "state")),
            *("--task", TASK, "--data", str(path), "--device", "cpu"),
            *policy,
        )
    study = load_app().study(setting.study)
    control = stack.enter_context(connect(address, state / certs.OPERATOR_BUNDLE))
    run_id = control.submit(study.read_text(), setting.overrides)
    with view:
        follow(control, run_id, view)
    if not isinstance(view.ended, events.RunFinished):
        reason = view.ended.reason if isinstance(view.ended, events.RunFailed) else "it was stopped"
        raise RunFailedError(f"the demo's run ended without a model: {reason}", hint=f"see {folder / 'logs'}")
    fetch(control, run_id, folder / "model")
    return _Result(run_id, (folder / "model" / "model.safetensors").read_bytes(), view.ended.seconds)


def split_by_hospital(folder: Path) -> dict[str, tuple[Path, int]]:
    """The heart data as one file a hospital, without the column that names it: what each site would hold.

    Returns:
        Hospital id to its file and its number of patients.
    """
    from importlib.resources import files

    from fedlearn.data.partition import client_id
    from fedlearn.tasks.heart import MISLABELLED_ID

    source = files("fedlearn.data") / "files" / "heart_disease_uci.csv"
    rows = list(csv.DictReader(source.read_text(encoding="utf-8-sig").splitlines()))
    columns = [name for name in rows[0] if name not in {"dataset", "id"}]
    by_hospital: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        hospital = "Hungary" if row["id"] == MISLABELLED_ID else row["dataset"]
        by_hospital.setdefault(client_id(hospital), []).append(row)
    found = {}
    for name, mine in sorted(by_hospital.items()):
        path = folder / name / "patients.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(mine)
        found[name] = (path, len(mine))
    return found


class Children:
    """Processes of this very program, all gone when the block is left.

    Args:
        logs: a folder for what each of them says.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *arguments: str) -> None:
        """Start `fedlearn ARGUMENTS`; its output goes to NAME.log."""
        with (self._logs / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C here reaches this program, which then stops its children in order.
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "fedlearn.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def wait_for_file(self, path: Path) -> str:
        """The text of a file that a child writes once it is ready.

        Raises:
            LinkError: a child ended instead, or it takes too long.
        """
        end = time.monotonic() + START_S
        while not path.exists():
            for name, process in self._running.items():
                if process.poll() is not None:
                    log = self._logs / f"{name}.log"
                    last = log.read_text(errors="replace").strip().splitlines()[-3:]
                    raise LinkError(f"{name} ended with exit code {process.returncode}: {' '.join(last)}")
            if time.monotonic() > end:
                raise LinkError(f"{path}: not there after {START_S:g} s", hint=f"see {self._logs}")
            time.sleep(_POLL_S)
        return path.read_text().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Sites first, so that the coordinator does not wait for them.
        for process in reversed(self._running.values()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ledgers(setting: _Setting) -> list[tuple[str, AccountState]]:
    """What each hospital's own ledger says, its signatures verified."""
    from fedlearn.privacy.ledger_file import account_states, ledgers_in, read_records, verify_ledger

    found = []
    for home in sorted(setting.folder.glob("hospitals/*/state")) if setting.private else ():
        for ledger in ledgers_in(home):
            if problems := verify_ledger(ledger).problems:
                raise StateError(f"{ledger}: {problems[0]}")
            found += [(home.parent.name, state) for state in account_states(read_records(ledger))]
    return found


def _compare(setting: _Setting, weights: bytes) -> Comparison:
    from fedlearn.app import load_app
    from fedlearn.report.comparison import compare
    from fedlearn.study import load_study

    found = compare(load_study(load_app().study(setting.study), setting.overrides), weights)
    found.plot(setting.folder / "auc.png")
    (setting.folder / "comparison.json").write_text(jsonlib.dumps(found.table(), indent=1))
    return found


def _print(
    setting: _Setting, comparison: Comparison, ledgers: Sequence[tuple[str, AccountState]], view: RunView
) -> None:
    folder = setting.folder
    if view.opened is not None:
        print("\nWhat the coordinator saw in the last round, the first numbers of each vector:\n")
        print("\n".join(f"  {line}" for line in seen.lines(view.opened, view.round_rows[-1]["clients"])))
    if ledgers:
        print(
            "\nWhat each hospital's own ledger has charged, every entry signed by it before the round's update left:\n"
        )
        from fedlearn.privacy.claims import shown

        charged = [
            (
                name,
                s.account,
                s.charges,
                None if s.epsilon is None else shown(s.epsilon),
                s.budget.epsilon if s.budget else None,
            )
            for name, s in ledgers
        ]
        print_table(charged, ("hospital", "account", "rounds", "epsilon", "budget"), indent="  ", right=(3,))
    print("\nAUC on each hospital's own test patients, a fifth of its own, that nobody trained on:\n")
    rows = comparison.table()
    print_table([tuple(row.values()) for row in rows], ("hospital", "test", *list(rows[0])[2:]), indent="  ")
    print(
        "\n  local only: the hospital trains alone. federated: what just ran. pooled: all rows in one place, which is"
    )
    print(
        "  possible here only because this data is public."
        + (" Neither protects anybody." if setting.private else " The same model, optimiser and passes for all.")
    )
    print("  One split of few patients says little (see how few are healthy in Switzerland): benchmarks/heart.py")
    print("  repeats it over 10 seeds, with intervals.")
    if comparison.identical is not None:
        verb = "are" if comparison.identical else "ARE NOT"
        print(f"\nthe simulation's final weights {verb} the federation's, byte for byte")
    print()
    for what, path in (
        ("model", folder / "model"),
        ("learning curve", folder / "model" / "curve.png"),
        ("AUC by hospital", folder / "auc.png"),
        *((("masked, and read", folder / SEEN),) if view.opened is not None else ()),
        *((("policies", folder / "hospitals" / "*" / "policy.toml"),) if setting.private else ()),
        *((("ledgers", folder / "hospitals" / "*" / "state" / "ledgers"),) if setting.private else ()),
        ("logs", folder / "logs"),
    ):
        print(f"{what:<16} {path}")


def _report(
    setting: _Setting,
    comparison: Comparison,
    result: _Result,
    view: RunView,
    ledgers: Sequence[tuple[str, AccountState]],
) -> dict[str, Any]:
    return {
        "run": result.run,
        "rounds": view.rounds_done,
        "seconds": result.seconds,
        "hospitals": comparison.table(),
        "identical_to_simulation": comparison.identical,
        "opened": None if view.opened is None else dataclasses.asdict(view.opened),
        "ledgers": [
            {"hospital": name, "account": state.account, "charges": state.charges, "epsilon": state.epsilon}
            for name, state in ledgers
        ],
        "folder": str(setting.folder),
    }


_MARK: Final = ".fedlearn-demo"


def _fresh(folder: Path) -> Path:
    """An empty folder; an older demo in its place is removed, anything else is left alone."""
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / _MARK).exists()):
            raise StateError(
                f"--out {folder}: exists and is no earlier demo", hint="choose a folder that does not exist"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        (folder / _MARK).touch()
    except OSError as error:
        raise StateError(f"--out {folder}: cannot be made: {error.strerror}") from None
    return folder


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    """With --json nothing but the JSON is printed."""
