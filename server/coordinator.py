"""The coordinator's process."""

from __future__ import annotations

from server.options import CoordinatorOptions


def serve(options: CoordinatorOptions) -> int:
    """Run a coordinator until it is told to stop.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        FedlearnError: it cannot start: AddressInUseError, StateError, TlsError ...
    """
    raise NotImplementedError(options)
