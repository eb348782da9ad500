"""The error tree: every failure that fedlearn foresees is one of these.

A message says what was got, what was expected, and what to do. Each class carries the exit code that the command
line returns for it, so that a script can tell a bad study from an unreachable server.
"""

from __future__ import annotations

from typing import ClassVar


class FedlearnError(Exception):
    """Root of the tree.

    Args:
        message: what was got and what was expected, in one or two sentences.
        hint: what the reader can do about it; shown on a line of its own.

    `permanent` is set by a site where it would answer whatever else the same run asks in the same way: its error reply carries the mark.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"
    permanent: bool = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class StudyError(FedlearnError):
    """A study file or an override of it cannot be read as it stands."""

    exit_code = 3
    kind = "study"


class DataError(FedlearnError):
    """Data is missing, or is not what the task's schema says."""

    exit_code = 4
    kind = "data"


class UpdateError(FedlearnError):
    """A client update cannot enter the sum: not finite, out of range, or of another shape."""

    exit_code = 5
    kind = "update"


class TlsError(FedlearnError):
    """A certificate, key or authority is missing, or does not fit."""

    exit_code = 6
    kind = "tls"


class LinkError(FedlearnError):
    """The other end cannot be reached, or the connection was lost for good."""

    exit_code = 7
    kind = "link"


class ProtocolError(LinkError):
    """Somebody broke the protocol."""

    kind = "protocol"


class LocalProtocolError(ProtocolError):
    """This end was about to break the protocol: a defect here."""


class RemoteProtocolError(ProtocolError):
    """The other end broke the protocol; nothing that it sent was used."""


class LimitExceededError(RemoteProtocolError):
    """A named limit on a size, count or depth was exceeded."""

    exit_code = 8
    kind = "limit"


class AddressInUseError(FedlearnError):
    """The address to listen on is taken."""

    exit_code = 9
    kind = "address"


class PolicyRefusedError(FedlearnError):
    """The site's policy refuses what was asked. Fail closed."""

    exit_code = 10
    kind = "policy"


class RunFailedError(FedlearnError):
    """A run ended before its last round: too few clients, or every attempt at one was void."""

    exit_code = 11
    kind = "run"


class StateError(FedlearnError):
    """Stored state is missing, locked, or belongs to something else."""

    exit_code = 12
    kind = "state"


class WorkerCrashedError(FedlearnError):
    """The training process beside the agent died or raised."""

    exit_code = 13
    kind = "worker"


class UnsupportedError(FedlearnError):
    """The combination that was asked for is not possible; the message says why."""

    exit_code = 14
    kind = "unsupported"


class AccountingError(FedlearnError):
    """Two privacy accountants contradict each other: a defect. Nothing is trained or claimed."""

    exit_code = 15
    kind = "accounting"


class ClaimRefutedError(FedlearnError):
    """An audit refuted what a study claims of its privacy: the code that trains is not what was accounted."""

    exit_code = 16
    kind = "audit"


INTERRUPTED_EXIT_CODE = 130
USAGE_EXIT_CODE = 2
