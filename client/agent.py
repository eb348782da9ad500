"""The site's agent process."""

from __future__ import annotations

from client.options import AgentOptions, Finding


def join(options: AgentOptions) -> int:
    """Serve a coordinator until told to stop.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        FedlearnError: it cannot start or go on: TlsError, StateError, PolicyRefusedError ...
    """
    raise NotImplementedError(options)


def check(options: AgentOptions) -> list[Finding]:
    """A dry run: policy, TLS, data against the task's schema, device, connection. Raises nothing foreseen."""
    raise NotImplementedError(options)
