"""The site's agent process: dials out, holds the keys, the policy and the gate, and leaves training to a worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from typing import TYPE_CHECKING, Any

from client import sandbox
from client.accounts import Accounts, ledger_folder, signing_key
from client.crew import Crew
from client.flower_masks import BY_AGENT
from client.foreign import ForeignSite
from client.masking import Masking
from client.policy import SiteRules, load_rules
from client.process import WorkerRaisedError
from client.site import Site
from fedlearn import logs
from fedlearn.app import App, load_app, own_root
from fedlearn.errors import StudyError, TlsError, WorkerCrashedError
from fedlearn.link import LinkClient, TlsBundle
from fedlearn.link import events as link_events
from fedlearn.link.enrolment import CertificateEnrolment, identity_of
from fedlearn.link.tls import Role
from fedlearn.lock import FolderLock
from fedlearn.privacy.budget import EpsilonCharger
from fedlearn.privacy.ledger_file import LEDGERS
from fedlearn.release.charge import CostCharger
from fedlearn.release.site import SiteGate
from fedlearn.release.sqlite import SqliteJournal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from flwr.app import Message

    from client.options import AgentOptions

log = logging.getLogger("fedlearn.client")


def join(options: AgentOptions) -> int:
    """Serve a coordinator until told to stop.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        FedlearnError: it cannot start or go on: TlsError, StateError, DataError ...
    """
    logs.configure(json_lines=options.json_logs, debug=options.debug)
    sandbox.hide_memory()
    bundle = client_bundle(options)
    app = load_app(options.app_dir)
    rules = site_rules(options, app)
    with FolderLock(options.state_dir, "an agent"):
        journal = SqliteJournal(options.state_dir / "releases")
        try:
            with open_accounts(options, bundle, rules) as accounts:
                charger = CostCharger({}) if accounts is None else EpsilonCharger(rules.accounts())
                book = None if accounts is None else accounts.ledger
                gate = SiteGate(journal, charger, rules.gate(), book)
                return asyncio.run(_serve(options, bundle, app, rules, gate, accounts))
        finally:
            journal.close()


def open_accounts(
    options: AgentOptions, bundle: TlsBundle, rules: SiteRules
) -> contextlib.AbstractContextManager[Accounts | None]:
    """The ledger of the site's data; None where the policy has no budget.

    Raises:
        StateError: see `LedgerFolder`.
    """
    if not rules.budgets.units:
        if (options.state_dir / LEDGERS).exists():
            log.warning(
                "the policy has no [budgets], and earlier runs were charged: what is asked from now on is not counted"
            )
        return contextlib.nullcontext()
    assert rules.dataset is not None
    folder = ledger_folder(options.state_dir, rules.dataset)
    name, key = bundle.identity.name, signing_key(bundle)
    return Accounts(folder, name, rules.dataset, key, rules.accounts(), bundle.ca_pem)


def client_bundle(options: AgentOptions) -> TlsBundle:
    """The site's certificate.

    Raises:
        TlsError: it is missing, broken, or not a client's.
    """
    bundle = TlsBundle.load(options.tls_dir)
    if bundle.identity.role is not Role.CLIENT:
        raise TlsError(
            f"{options.tls_dir}: the certificate is for {bundle.identity.uri}, expected the role client",
            hint="ask the coordinator's operator for one: fedlearn certs issue NAME --role client",
        )
    return bundle


def site_rules(options: AgentOptions, app: App) -> SiteRules:
    """The policy with the command line's defaults.

    Raises:
        StudyError: the policy file is refused, or no task is named.
    """
    rules = load_rules(options.policy)
    if app.native and options.task is None:
        raise StudyError("client: no --task", hint="name the task that this site takes part in, such as hospital/heart")
    if not app.native and rules.budgets.units:
        raise StudyError(
            "policy: budgets: nothing of a foreign app is charged, so they would promise what nobody keeps",
            hint="start this site without --app, or without [budgets]",
        )
    if not app.native and rules.secure_aggregation.required:
        raise StudyError(
            "policy: secure_aggregation: what a foreign app answers leaves as it is, so it would promise what nobody keeps",
            hint="start this site without --app, or without secure_aggregation",
        )
    return rules.with_defaults(options.task or "", app.digest)


def node_config(options: AgentOptions, name: str) -> dict[str, Any]:
    """What the app is told of this site."""
    config: dict[str, Any] = {"client-id": name, "device": options.device, BY_AGENT: True}
    if options.data is not None:
        config["data"] = str(options.data.resolve())
    if options.threads is not None:
        config["threads"] = options.threads
    return config


def site_masking(bundle: TlsBundle, app: App) -> Masking:
    """This site's keys for secure aggregation; its certificate says who it is, and its authority who the others are.

    Raises:
        TlsError: the certificate's key cannot sign there.
    """
    identity, claim = identity_of(bundle)
    return Masking(
        identity,
        claim,
        CertificateEnrolment(bundle.ca_pem),
        lambda study: app.strategy(study.strategy.name, study.strategy.options),
    )


async def _serve(
    options: AgentOptions, bundle: TlsBundle, app: App, rules: SiteRules, gate: SiteGate, accounts: Accounts | None
) -> int:
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        asyncio.get_running_loop().add_signal_handler(number, _tell, told, code)
    name = bundle.identity.name
    crew = Crew(own_root(), None if app.root == own_root() and app.native else options.app_dir, name)
    config = node_config(options, name)
    handle: Callable[[Message], Awaitable[Message]]
    site = None
    if app.native:
        site = Site(crew, rules, gate, config, accounts, site_masking(bundle, app))
        handle = site.handle
    else:
        handle = ForeignSite(crew, config, app.config).handle
    facts = {"task": options.task or "", "device": options.device}
    client = LinkClient(options.server, bundle, handle, facts, emit=_log_event)
    link = asyncio.create_task(client.run(), name="link")
    # The link's handlers wait for the worker, so both can start at once.
    worker = asyncio.create_task(_warm_up(crew), name="worker")
    try:
        waiting: set[asyncio.Future[Any]] = {link, worker, told}
        while not told.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()  # raises what ended it; a worker that is warm ends nothing
        log.info("stopping")
        return told.result()
    finally:
        for task in (link, worker):
            task.cancel()
        await asyncio.gather(link, worker, return_exceptions=True)
        if site is not None:
            site.close()
        await crew.close()


async def _warm_up(crew: Crew) -> None:
    """Start the first worker. An app that cannot be loaded ends the agent; a process that was killed meanwhile is replaced later."""
    try:
        await crew.warm_up()
    except WorkerRaisedError:
        raise
    except WorkerCrashedError as error:
        log.warning("%s; the first message will start another", error.message)


def _tell(told: asyncio.Future[int], code: int) -> None:
    if not told.done():
        told.set_result(code)


def _log_event(event: link_events.LinkEvent) -> None:
    match event:
        case link_events.LinkConnected(peer=peer):
            log.info("connected to %s, waiting for work", peer)
        case link_events.LinkLost(peer=peer, reason=reason, retry_in_s=retry_s):
            log.warning("%s: %s; dialling again in %.1f s", peer, reason, retry_s or 0.0)
        case link_events.HandlerFailed(error=error):
            log.warning("a message was answered with an error: %s", error)
        case _:
            log.info("%s", event)
