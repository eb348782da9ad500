"""Sites in this process behind real agents' handlers, on a real link: runs with masks, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.accounts import Accounts, ledger_folder
from client.policy import load_rules
from tests.support.desk_site import DeskSites
from tests.support.link_net import LinkNet, link_net
from tests.support.runs import Run, run_on_link
from tests.support.tiny_task import CLIENTS, NAME

RUNS = iter(range(1, 1000))


class DeskNet:
    """A link with its sites; runs are started one after another."""

    def __init__(self, link: LinkNet, sites: DeskSites) -> None:
        self.link, self.sites, self.runs = link, sites, list[Run]()

    def run(self, study, *, meets=None, journal=None, number=None, emit=None) -> Run:
        number = self.last = number if number is not None else next(RUNS)
        run, grid = Run(), self.link.grid(number)
        self.runs.append(run)
        self.cancel = grid.cancel  # what a coordinator's end is to a run
        self.sites.meets = meets if meets is not None else lambda *_asked: None
        authority = self.link.authority_pem
        return run_on_link(self.link, number, study, emit, journal=journal, run=run, grid=grid, authority_pem=authority)


@contextmanager
def private_net(folder: Path, budgets: str) -> Iterator[DeskNet]:
    """Four sites of the tiny task that keep ledgers and answer with masks alone.

    Args:
        folder: for policy and ledgers.
        budgets: tables of the policy.
    """
    policy = folder / "policy.toml"
    policy.write_text(f'tasks = ["{NAME}"]\ndataset = "tiny"\nseeded = true\nsecure_aggregation = true\n{budgets}')
    rules = load_rules(policy)

    def accounts(name: str) -> Accounts:
        key = Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32, b"."))
        return Accounts(ledger_folder(folder / name, "tiny"), name, "tiny", key, rules.accounts())

    sites = DeskSites(NAME, rules=rules, accounts_of=accounts)
    with link_net(folder, CLIENTS, handler_of=sites.handler) as link:
        yield DeskNet(link, sites)
    sites.close()
