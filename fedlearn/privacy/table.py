"""The table [privacy] in a study: a budget or a noise multiplier, and all that a plan needs besides. See docs/privacy.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from fedlearn.strict import STRICT


class PrivacyTable(BaseModel):
    """[privacy]: what is protected, and how much of it may be spent. Absent: the run is not private."""

    model_config = STRICT

    unit: Literal["record", "group", "client"]
    """Whose presence is hidden: one row at one site; all rows of one person there; a whole client."""
    epsilon: Annotated[float, Field(gt=0)] | None = None
    """The most that the planned rounds may cost; the least noise that keeps to it is found. Or give `noise_multiplier`."""
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None
    """Standard deviation of the noise / clip_l2, in place of `epsilon`."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Less than 1 / the number of units; 1 / (10 n) or less is usual."""
    clip_l2: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm that each unit's contribution is clipped to; the first one of an adaptive clip."""
    clipping: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: the clip follows a quantile of the norms (Andrew et al. 2021)."""
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of adaptive: which quantile of the norms the clip follows."""
    clip_rate: Annotated[float, Field(gt=0, le=10)] = 0.2
    """Of adaptive: how fast it does."""
    mechanism: Literal["gaussian", "ftrl", "distributed"] = "gaussian"
    """Clients: gaussian draws each round's noise anew; ftrl lets it cancel the earlier rounds' (DP-FTRL), for clients that come when they can, so
    that no draw amplifies anything; distributed: each client adds a share of it under secure aggregation, so the server is not trusted with it."""
    survivors: Annotated[int, Field(ge=3, le=10_000)] | None = None
    """Of distributed: sums of fewer clients are not opened; the fewer, the more noise each adds. All of a round but secure_aggregation.dropout of them if not told."""
    min_separation: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Of ftrl: a client that was asked in round t is asked again in round t + min_separation at the earliest."""
    max_participations: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Of ftrl: the most rounds in which one client is asked; as many as min_separation lets it if not told."""
    matrix: Literal["blt", "banded"] = "blt"
    """Of ftrl: how noise is correlated. blt: fitted to the plan, with two models of memory; banded: with min_separation - 1 of them."""
    surplus: bool = False
    """Of distributed: take off what more survivors than planned bring too much of, once that many are proven. A few bytes for each pair of clients."""
    units: Annotated[int, Field(ge=1, le=10**12)] | None = None
    """A public number of units: sums are divided by what it makes expected, never by the real count. Records or groups: of a client, 100 if
    not told. Clients: how many there are at the least; `data.clients` if not told. Of distributed only delta depends on it; the most clients of a round if not told."""
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Records and groups: each one's probability to be in a step's batch."""
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Records and groups: noisy steps of a round."""
    group: Annotated[str, Field(max_length=200)] = ""
    """Groups: the column that names each row's person or account."""
    evaluation_noise: Annotated[float, Field(gt=0)] | None = None
    """Records and groups: sites answer evaluations with a histogram under this noise multiplier, which is charged. Absent: no metric leaves a site."""
    seeded: bool = False
    """Derive the noise from the study's seed, to rehearse: reproducible, hence not private. Sites may refuse it."""

    @model_validator(mode="after")
    def _consistent(self) -> PrivacyTable:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("epsilon, noise_multiplier: give exactly one of them")
        if self.unit == "group" and not self.group:
            raise ValueError("group: missing; name the column that holds each row's person or account")
        if self.unit != "group" and self.group:
            raise ValueError(f'group: only for unit = "group", got unit = "{self.unit}"')
        if self.unit == "client":
            for name in ("sampling_rate", "steps"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: is for records and groups; who takes part in a round is [cohort]'s")
            if self.evaluation_noise is not None:
                raise ValueError("evaluation_noise: is for records and groups")
        self._check_mechanism()
        return self

    def _check_mechanism(self) -> None:
        if self.survivors is not None and self.mechanism != "distributed":
            raise ValueError('survivors: only for mechanism = "distributed"')
        if self.surplus and self.mechanism != "distributed":
            raise ValueError('surplus: only for mechanism = "distributed"')
        if self.mechanism == "distributed":
            if self.unit != "client":
                raise ValueError(f'mechanism: distributed is for unit = "client", got unit = "{self.unit}"')
            if self.clipping == "adaptive":
                raise ValueError(
                    "clipping: adaptive does not go with distributed: clients round to steps that follow from the clip"
                )
        if self.mechanism == "ftrl":
            if self.unit != "client":
                raise ValueError(f'mechanism: ftrl is for unit = "client", got unit = "{self.unit}"')
            if self.clipping == "adaptive":
                raise ValueError(
                    "clipping: adaptive does not go with ftrl: noise that is to cancel an earlier round's must be on its scale"
                )
            if self.min_separation is None:
                raise ValueError(
                    "min_separation: missing; under ftrl the noise follows from how soon a client may be asked again"
                )
            return
        for name in ("min_separation", "max_participations", "matrix"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name}: only for mechanism = "ftrl"')
