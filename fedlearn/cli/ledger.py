"""`fedlearn ledger`: what a site has spent, whether its record is whole, and a copy for an auditor."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlearn.cli.options import Debug, Json
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedlearn.privacy.chain import Record, SignedHead
    from fedlearn.privacy.ledger_file import AccountState, Verification

Folder = Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger's folder, or its file.")]
Folders = Annotated[
    Path,
    typer.Argument(metavar="LEDGER", help="A ledger's folder or file, or an agent's state folder for all of them."),
]


def show(ledger: Folders, json: Json = False, debug: Debug = False) -> None:
    """Show what ledgers' accounts have spent, and who was refused. Reading needs no lock: the agent may be running."""
    del debug
    from fedlearn.privacy.ledger_file import account_states, ledgers_in, read_records, verify_ledger

    read = [(account_states(read_records(one)), verify_ledger(one)) for one in ledgers_in(ledger)]
    if json:
        documents = [{**_about(found), "accounts": [_account(state) for state in states]} for states, found in read]
        print_json(documents[0] if len(documents) == 1 else {"ledgers": documents})
        return
    for number, (states, found) in enumerate(read):
        _print(states, found, first=number == 0)


def _print(states: Sequence[AccountState], found: Verification, *, first: bool) -> None:
    from fedlearn.privacy.claims import shown

    before = "" if first else "\n"
    print(f"{before}site {found.site}, data set {found.data_set}: {found.records} records, head {found.head[:16]}\n")
    rows = [
        (
            s.account,
            s.charges,
            s.voids,
            s.refusals,
            None if s.epsilon is None else shown(s.epsilon),
            s.budget.epsilon if s.budget else None,
            s.budget.rule.value if s.budget else "-",
        )
        for s in states
    ]
    print_table(rows, ("account", "charges", "voids", "refusals", "epsilon", "budget", "rule"), right=(4,))
    for problem in found.problems:
        print(f"\nproblem: {problem}")


def verify(
    ledger: Folder,
    head: Annotated[
        Path | None,
        typer.Option("--head", metavar="FILE", help="A signed head kept elsewhere: the ledger must go on from it too."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Check every hash and signature of a ledger, and that no record is cut off. Exit code 12 when something is wrong.

    What tells that records are missing at the end is the agent's own signed head (head.json beside the ledger), or one that is kept elsewhere.
    """
    del debug
    from fedlearn.privacy.ledger_file import verify_ledger

    found = verify_ledger(ledger, None if head is None else _head(head))
    if json:
        print_json({**_about(found), "ok": not found.problems})
    else:
        for problem in found.problems:
            print(f"problem: {problem}")
        whose = f" of site {found.site!r}, data set {found.data_set!r}" if found.records else " can be read"
        print(f"{found.records} records{whose}: {'not sound' if found.problems else 'sound'}")
        if found.compared_with:
            print(f"compared with {' and '.join(found.compared_with)}")
        elif found.records:
            print("no head to compare with: records cut off its end would not show (--head names one kept elsewhere)")
    return StateError.exit_code if found.problems else 0


def export(
    ledger: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it here; standard output without it.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a ledger with its accounts and every record as one JSON document, for an auditor."""
    del debug
    from fedlearn.privacy.ledger_file import account_states, read_records, verify_ledger

    records, found = read_records(ledger), verify_ledger(ledger)
    document = {
        **_about(found),
        "accounts": [_account(state) for state in account_states(records)],
        "records": [_record(record) for record in records],
    }
    if out is None:
        print_json(document)
        return
    try:
        out.write_text(json_text.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StateError(f"{out}: cannot be written: {error.strerror}", hint="choose another file with --out") from None
    print(f"{out}: {len(records)} records")


def _head(path: Path) -> SignedHead:
    from fedlearn.privacy.chain import SignedHead

    try:
        return SignedHead.from_text(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"{path}: cannot be read: {error}", hint="--head names a file with a signed head") from None


def _about(found: Verification) -> dict[str, Any]:
    tree = asdict(found)
    return {**tree, **{name: list(tree[name]) for name in ("keys", "compared_with", "problems")}}


def _account(state: AccountState) -> dict[str, Any]:
    budget = None if state.budget is None else {**asdict(state.budget), "rule": state.budget.rule.value}
    return {**asdict(state), "budget": budget}


def _record(record: Record) -> dict[str, Any]:
    return {
        "seq": record.seq,
        "time": record.time,
        "kind": record.kind.value,
        "body": dict(record.body),
        "prev": record.prev,
        "sha256": record.sha256,
    }
