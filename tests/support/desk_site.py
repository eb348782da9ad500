"""A site's agent in this process: its real policy, gate and keys, and the worker's real code in a thread instead of a process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from flwr.app import Message

from client.accounts import Accounts
from client.agent import site_masking
from client.app import app as client_app
from client.flower_masks import BY_AGENT
from client.frames import Frame
from client.policy import SiteRules
from client.site import Site
from client.worker import _answer
from fedlearn.app import load_app
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import brings_model, decode_facts
from fedlearn.link import TlsBundle
from fedlearn.privacy.budget import EpsilonCharger
from fedlearn.release.charge import Charge, Charger, CostCharger
from fedlearn.release.journal import MemoryDisk, MemoryJournal
from fedlearn.release.records import Release
from fedlearn.release.site import SiteGate

_ONE_AT_A_TIME = threading.Lock()
"""torch's settings are the process's."""


class Desk:
    """`Crew` without processes.

    Attributes:
        works: called in the worker's thread before each answer.
        calls: how often it was asked.
    """

    def __init__(self) -> None:
        self.works: Callable[[], None] = lambda: None
        self.calls = 0

    async def call(self, run: str, frame: Frame) -> Frame:
        return await asyncio.to_thread(self._work, frame)

    def _work(self, frame: Frame) -> Frame:
        self.calls += 1
        self.works()
        with _ONE_AT_A_TIME:
            return _answer(client_app, frame)


class DeskSites:
    """Sites by name, each of which can be killed: what it held in memory is gone, what it committed is not.

    Args:
        tasks: that they take part in.
        rules: their policy, in place of the tasks alone.
        accounts_of: makes a site's ledger; without it nothing is charged.

    Attributes:
        meets: told of each request before it is answered: `meets(site, exchange, round, attempt)`. Raises to lose it.
        desks: their workers, by name.
        models: every request that brought a model, by site and exchange.
        replies: every reply that left, by site and exchange.
    """

    def __init__(
        self,
        *tasks: str,
        rules: SiteRules | None = None,
        accounts_of: Callable[[str], Accounts] | None = None,
    ) -> None:
        self._rules = rules if rules is not None else SiteRules(tasks=tasks)
        self._accounts_of, self._accounts = accounts_of, dict[str, Accounts]()
        self.meets: Callable[[str, Exchange, int, int], None] = lambda *_asked: None
        self._disks: dict[str, MemoryDisk] = {}
        self._sites: dict[str, Site] = {}
        self.desks: dict[str, Desk] = {}
        self._gates: dict[str, SiteGate] = {}
        self._bundles: dict[str, TlsBundle] = {}
        self.models: list[tuple[str, Exchange]] = []
        self.replies: list[tuple[str, Exchange, Message]] = []

    def handler(self, bundle: TlsBundle):
        """What `link_net` asks for."""
        name = bundle.identity.name
        self._bundles[name], self._disks[name] = bundle, MemoryDisk()
        self.kill(name)

        async def handle(message: Message) -> Message:
            facts = decode_facts(message.content)
            if brings_model(message.content):
                self.models.append((name, facts.exchange))
            self.meets(name, facts.exchange, facts.round, facts.attempt)
            reply = await self._sites[name].handle(message)
            self.replies.append((name, facts.exchange, reply))
            return reply

        return handle

    def kill(self, name: str) -> None:
        """kill -9 and a restart."""
        app = load_app()
        charger: Charger = CostCharger({})
        if self._accounts_of is not None:
            if name in self._accounts:
                self._accounts.pop(name).__exit__(None, None, None)
            self._accounts[name] = self._accounts_of(name).__enter__()
            charger = EpsilonCharger(self._rules.accounts())
        accounts = self._accounts.get(name)
        book = None if accounts is None else accounts.ledger
        gate = self._gates[name] = SiteGate(MemoryJournal(self._disks[name]), charger, self._rules.gate(), book)
        config = {"client-id": name, "device": "cpu", BY_AGENT: True}
        crew: Any = self.desks.setdefault(name, Desk())
        self._sites[name] = Site(crew, self._rules, gate, config, accounts, site_masking(self._bundles[name], app))

    def releases(self, name: str) -> list[Release]:
        """What a site's gate has committed."""
        return list(self._gates[name].releases())

    def spend(self, name: str, charge: Charge) -> None:
        """Other runs charge a site's account until that charge has no room any more."""
        gate, number = self._gates[name], 0
        while gate.fits(charge):
            number += 1
            assert gate.admit(f"another-{number}", charge) is None

    def close(self) -> None:
        """Close every ledger."""
        for accounts in self._accounts.values():
            accounts.__exit__(None, None, None)
