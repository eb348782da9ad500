"""The tables under [environment] in a study: who is there, how fast they are, and when a round ends. For simulations alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from fedlearn.strict import STRICT


class _Table(BaseModel):
    model_config = STRICT


class AvailabilityTable(_Table):
    """[environment.availability]: which clients can be asked."""

    kind: Literal["always", "bernoulli", "diurnal", "trace"] = "always"
    """always; bernoulli: with a fixed chance, drawn anew each round; diurnal: by the hour where the client is; trace: as recorded in a file."""
    chance: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of bernoulli: that a client is there."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Of diurnal: the chance twelve hours away from the peak."""
    highest: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of diurnal: the chance at the peak."""
    peak_hour: Annotated[float, Field(ge=0, lt=24)] = 2.0
    """Of diurnal: local hour at which most are there; phones that charge by night have it at 2."""
    time_zones: Annotated[int, Field(ge=1, le=24)] = 24
    """Of diurnal: clients are spread evenly over so many time zones, from UTC eastwards an hour each."""
    trace: Annotated[str, Field(max_length=4096)] = ""
    """Of trace: path of a CSV with the columns client, from_s and until_s."""

    @model_validator(mode="after")
    def _consistent(self) -> AvailabilityTable:
        if self.kind == "trace" and not self.trace:
            raise ValueError("trace: missing; name a CSV with the columns client, from_s and until_s")
        if self.lowest > self.highest:
            raise ValueError(f"lowest: got {self.lowest:g}, expected at most highest = {self.highest:g}")
        return self


class DeviceTable(_Table):
    """[environment.devices.NAME]: one class of devices. Speeds are medians of lognormal distributions; a spread of 0 makes them constant."""

    share: Annotated[float, Field(gt=0)] = 1.0
    """Of the clients, relative to the other classes' shares."""
    examples_per_s: Annotated[float, Field(gt=0)] = 100.0
    """Training examples a second, forward and backward."""
    compute_spread: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Standard deviation of the natural logarithm of a client's computing speed."""
    download_mbit_s: Annotated[float, Field(gt=0)] = 20.0
    """Megabits (10^6) a second from the coordinator."""
    upload_mbit_s: Annotated[float, Field(gt=0)] = 5.0
    """Megabits (10^6) a second to the coordinator."""
    network_spread: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Standard deviation of the natural logarithm of a client's bandwidth, the same factor both ways."""
    latency_s: Annotated[float, Field(ge=0)] = 0.1
    """Before the first byte of each message, either way."""


class EnvironmentTable(_Table):
    """[environment]: the world that a simulation imagines around its clients."""

    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """A round ends after so many virtual seconds, and who is not done is left out; absent: it waits for everybody."""
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Ask cohort.size times as many clients; the first cohort.size updates end the round."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The chance that a client vanishes during a round, at any point of its work."""
    jitter: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Standard deviation of the natural logarithm of how much slower a client is in one round than in another."""
    start_hour: Annotated[float, Field(ge=0, lt=24)] = 0.0
    """The hour of the day, UTC, at which the run begins."""
    server_s: Annotated[float, Field(ge=0)] = 0.0
    """The coordinator's own virtual seconds a round: its work, and the pause before the next one."""
    availability: AvailabilityTable = AvailabilityTable()
    devices: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=64)], DeviceTable], Field(max_length=100)
    ] = {}
    """Classes of devices; without any, all clients are of one class with the defaults."""
