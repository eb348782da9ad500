"""`fedlearn client --check`: a dry run, before anything is promised to anyone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from client.agent import client_bundle, site_rules
from client.options import AgentOptions, Finding
from fedlearn.app import load_app
from fedlearn.errors import FedlearnError, LocalProtocolError
from fedlearn.link import LinkClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.app import Message


def check(options: AgentOptions) -> list[Finding]:
    """Check policy, TLS, data against the task's schema, device and connection; raises nothing foreseen."""
    checks: tuple[tuple[str, Callable[[AgentOptions], str]], ...] = (
        ("policy", _policy),
        ("tls", lambda o: client_bundle(o).identity.uri),
        ("data", _data),
        ("device", _device),
        ("connection", _connection),
    )
    return [_finding(what, call, options) for what, call in checks]


def _finding(what: str, call: Callable[[AgentOptions], str], options: AgentOptions) -> Finding:
    try:
        return Finding(what, ok=True, detail=call(options))
    except FedlearnError as error:
        return Finding(what, ok=False, detail=error.message, hint=error.hint, exit_code=error.exit_code)


def _policy(options: AgentOptions) -> str:
    rules = site_rules(options, load_app(options.app_dir))
    where = "the defaults" if options.policy is None else str(options.policy)
    return f"{where}: admits {', '.join(rules.tasks)}, at most {rules.max_rounds} rounds"


def _data(options: AgentOptions) -> str:
    from fedlearn.tasks import load_task

    if options.task is None:
        return "not checked: a foreign app reads its own data"
    load_app(options.app_dir)
    examples = load_task(options.task, {}).load(options.data)
    where = "the data that ships with the task" if options.data is None else str(options.data)
    return f"{where}: {len(examples)} examples fit the schema of {options.task}"


def _device(options: AgentOptions) -> str:
    from fedlearn.learning.device import resolve_device

    return resolve_device(options.device)


def _connection(options: AgentOptions) -> str:
    async def refuse(message: Message) -> Message:
        raise LocalProtocolError(f"a dry run answers no messages, got {message.metadata.message_type}")

    asyncio.run(LinkClient(options.server, client_bundle(options), refuse).check())
    return f"{options.server} accepts this client"
