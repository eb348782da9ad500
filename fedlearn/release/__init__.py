"""The release path: seeds, sums, charges and crashes meet here. State machines without I/O besides a journal.

The site's half is `SiteGate`: charge and finished bytes are durable together before a byte may leave. The coordinator's
half is `RoundMachine`: one exact sum per round over exactly the journaled survivors.
"""

from fedlearn.release.charge import Charge, Charger, CostCharger, Weighing
from fedlearn.release.checksum import checksum_of
from fedlearn.release.coordinator import RoundMachine
from fedlearn.release.journal import Changes, Journal, MemoryDisk, MemoryJournal
from fedlearn.release.keys import TRAIN, UNMASK, AttemptId, ReleaseKey
from fedlearn.release.records import (
    Finished,
    InProgress,
    Refusal,
    Refused,
    Release,
    Reserved,
    SitePolicy,
    Status,
)
from fedlearn.release.round import (
    Accepted,
    Accumulator,
    Attempt,
    Begin,
    Duplicate,
    Failed,
    Masking,
    NoMasking,
    Rejected,
    Rejection,
    Resume,
    RoundPolicy,
    RoundState,
)
from fedlearn.release.site import SiteGate

__all__ = [
    "TRAIN",
    "UNMASK",
    "Accepted",
    "Accumulator",
    "Attempt",
    "AttemptId",
    "Begin",
    "Changes",
    "Charge",
    "Charger",
    "CostCharger",
    "Duplicate",
    "Failed",
    "Finished",
    "InProgress",
    "Journal",
    "Masking",
    "MemoryDisk",
    "MemoryJournal",
    "NoMasking",
    "Refusal",
    "Refused",
    "Rejected",
    "Rejection",
    "Release",
    "ReleaseKey",
    "Reserved",
    "Resume",
    "RoundMachine",
    "RoundPolicy",
    "RoundState",
    "SiteGate",
    "SitePolicy",
    "Status",
    "Weighing",
    "checksum_of",
]
