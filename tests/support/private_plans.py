"""Privacy tables of every kind, as overrides of a study: loose clips and some noise, so that clipping and noise both matter."""

from __future__ import annotations

from typing import Final

RECORD: Final = (
    "privacy.unit=record",
    "privacy.noise_multiplier=0.6",
    "privacy.delta=1e-3",
    "privacy.clip_l2=0.4",
    "privacy.units=6",
    "privacy.sampling_rate=0.4",
    "privacy.steps=3",
)
CLIENT: Final = (
    "privacy.unit=client",
    "privacy.noise_multiplier=0.5",
    "privacy.delta=1e-3",
    "privacy.clip_l2=0.1",
    "privacy.units=9",
)
ADAPTIVE: Final = ("privacy.clipping=adaptive", "privacy.clip_rate=0.7")
PLANS: Final = {
    "record": RECORD,
    "record adaptive": (*RECORD, *ADAPTIVE),
    "group adaptive": (*RECORD[1:], *ADAPTIVE, "privacy.unit=group", "privacy.group=owner"),
    "client": CLIENT,
    "client adaptive": (*CLIENT, *ADAPTIVE),
    "client cohort adaptive": (*CLIENT, *ADAPTIVE, "cohort.size=9"),
    "client poisson": (*CLIENT, "cohort.rate=0.4"),
    "client poisson adaptive": (*CLIENT, *ADAPTIVE, "cohort.rate=0.4"),
    "client ftrl": (*CLIENT, "privacy.mechanism=ftrl", "privacy.min_separation=2", "cohort.size=4"),
    "client nobody": (*CLIENT, *ADAPTIVE, "cohort.rate=1e-9"),
}
"""By name. For nine clients or more."""
