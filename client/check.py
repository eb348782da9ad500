"""`fedlearn client --check`: a dry run, before anything is promised to anyone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from client.accounts import ledger_folder
from client.agent import client_bundle, site_rules
from client.options import AgentOptions, Finding
from client.policy import SEEDED
from fedlearn.app import load_app
from fedlearn.errors import DataError, FedlearnError, LocalProtocolError, PolicyRefusedError, StateError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import Request
from fedlearn.link import LinkClient
from fedlearn.privacy.budget import EpsilonCharger, spent_epsilon
from fedlearn.privacy.claims import shown
from fedlearn.privacy.events import Cost
from fedlearn.privacy.ledger_file import LEDGER_FILE, charges_of, read_records, verify_ledger
from fedlearn.privacy.ledger_head import HEAD_FILE
from fedlearn.release.charge import Charge

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flwr.app import Message

    from client.policy import SiteRules
    from fedlearn.learning.task import Examples
    from fedlearn.release.charge import Weighing


def check(options: AgentOptions) -> list[Finding]:
    """Check policy, TLS, data against the task's schema, device and connection; raises nothing foreseen."""
    checks: tuple[tuple[str, Callable[[AgentOptions], str]], ...] = (
        ("policy", _policy),
        ("tls", lambda o: client_bundle(o).identity.uri),
        ("data", _data),
        ("device", _device),
        ("budget", _budget),
        *([("study", _study)] if options.study is not None else []),
        ("connection", _connection),
    )
    found: list[Finding] = []
    for what, call in checks:
        one = _finding(what, call, options)
        # What several checks stand on (the policy, the certificates) is said once.
        same = next((other.what for other in found if not other.ok and other.detail == one.detail), "")
        found.append(replace(one, detail=f"not checked: {same} is not in order", hint="") if same else one)
    return found


def _finding(what: str, call: Callable[[AgentOptions], str], options: AgentOptions) -> Finding:
    try:
        return Finding(what, ok=True, detail=call(options))
    except FedlearnError as error:
        return Finding(what, ok=False, detail=error.message, hint=error.hint, exit_code=error.exit_code)


def _policy(options: AgentOptions) -> str:
    rules = site_rules(options, load_app(options.app_dir))
    where = "the defaults" if options.policy is None else str(options.policy)
    counted = f"; counts what is spent of {rules.dataset!r}" if rules.budgets.units else ""
    return f"{where}: admits {', '.join(rules.tasks)}, at most {rules.max_rounds} rounds{counted}"


def _data(options: AgentOptions) -> str:
    from fedlearn.tasks import load_task

    if options.task is None:
        return "not checked: a foreign app reads its own data"
    load_app(options.app_dir)
    examples = load_task(options.task, {}).load(options.data).whole()
    _check_delta(options, examples)
    where = "the data that ships with the task" if options.data is None else str(options.data)
    return f"{where}: {len(examples)} examples fit the schema of {options.task}"


def _check_delta(options: AgentOptions, examples: Examples) -> None:
    """A delta of 1 / n is met by publishing one record at random."""
    table = site_rules(options, load_app(options.app_dir)).budgets.record
    if table is None:
        return
    mine = examples.client == client_bundle(options).identity.name if examples.client is not None else None
    count = len(examples) if mine is None else int(mine.sum())
    if table.delta * count >= 1:
        raise DataError(
            f"policy: budgets.record.delta is {table.delta:g}, and this site has {count} records: expected less than 1/{count}",
            hint=f"take {1 / (10 * count):.0e} or less",
        )


def _budget(options: AgentOptions) -> str:
    rules = site_rules(options, load_app(options.app_dir))
    if not rules.budgets.units:
        return "none: studies with a privacy plan are refused, the others are not counted"
    charges = _charges(options, rules)
    found = []
    for account, budget in rules.accounts().items():
        spent = spent_epsilon([Cost.from_text(charge.cost) for charge in charges(account)], budget)
        if spent or not account.endswith(SEEDED):
            found.append(f"{account}: epsilon {shown(spent)} of {budget.epsilon:g} spent (delta {budget.delta:g})")
    return "; ".join(found)


def _study(options: AgentOptions) -> str:
    """What the gate would say of the study's first update, and for how many rounds."""
    from client.guard import guard_of
    from fedlearn.data.population import site_population
    from fedlearn.privacy.site import site_plan
    from fedlearn.privacy.study import protects_rows
    from fedlearn.study import load_study
    from fedlearn.tasks import task_of

    assert options.study is not None
    app = load_app(options.app_dir)
    rules, study = site_rules(options, app), load_study(options.study)
    rules.admit(Request("check", Exchange.DESCRIBE, study.to_json(), app.digest))
    if study.privacy is None:
        return f"{study.name}: admitted; it has no [privacy], so the coordinator sees this site's updates as they are"
    account = rules.account(study.privacy)
    guard = guard_of(study.to_json(), account)
    assert guard is not None
    if protects_rows(study):
        name = client_bundle(options).identity.name
        mine = site_population(study, task_of(study), name, options.data, strict=True).client(name).train
        site_plan(
            study, 1, name, mine, rehearsal=True
        )  # refused where there are no rows, or delta is too large for so many
    spent, charger = _charges(options, rules)(account), EpsilonCharger(rules.accounts())

    def weighed(rounds: int) -> Weighing:
        return charger.weigh(spent, Charge(account, guard.plan.whole_cost(rounds).to_text()))

    least, most = (study.rounds if guard.admission is not None else 1), study.rounds
    first = weighed(least)
    if not first.allowed:
        raise PolicyRefusedError(
            f"{study.name}: {'the run' if least > 1 else 'its first round'} would take {account!r} from epsilon {shown(first.spent)} "
            f"to {shown(first.after)}, the budget is {first.budget}",
            hint="a study that costs less; or whoever answers for the data raises the budget",
        )
    fits, too_many = least, most + 1
    while too_many - fits > 1:  # what more rounds cost only grows
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if weighed(middle).allowed else (fits, middle)
    end = weighed(fits)
    lasts = "" if fits == most else f"; the budget ends it after {fits} of its {most} rounds"
    return f"{study.name}: admitted; {account!r} goes from epsilon {shown(end.spent)} to {shown(end.after)} of {end.budget}{lasts}"


def _charges(options: AgentOptions, rules: SiteRules) -> Callable[[str], Sequence[Charge]]:
    """What each account was charged so far, by the ledger; the agent may be running."""
    assert rules.dataset is not None
    folder = ledger_folder(options.state_dir, rules.dataset)
    if not any((folder / name).exists() for name in (LEDGER_FILE, HEAD_FILE)):
        return lambda _: ()
    found = verify_ledger(folder)
    if found.problems:
        raise StateError(f"ledger {folder}: {found.problems[0]}", hint="see `fedlearn ledger verify`")
    owner, mine = (found.site, found.data_set), (client_bundle(options).identity.name, rules.dataset)
    if owner != mine:
        raise StateError(
            f"ledger {folder}: it is of site {owner[0]!r}, data set {owner[1]!r}; expected {mine[0]!r}, {mine[1]!r}"
        )
    records = read_records(folder)
    return lambda account: charges_of(records, account)


def _device(options: AgentOptions) -> str:
    from fedlearn.learning.device import resolve_device

    return resolve_device(options.device)


def _connection(options: AgentOptions) -> str:
    async def refuse(message: Message) -> Message:
        raise LocalProtocolError(f"a dry run answers no messages, got {message.metadata.message_type}")

    asyncio.run(LinkClient(options.server, client_bundle(options), refuse).check())
    return f"{options.server} accepts this client"
