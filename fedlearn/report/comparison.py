"""What a federation gives each of its clients, beside training alone and beside having all data in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedlearn import arrays
from fedlearn.data.population import build_population
from fedlearn.learning.population import Population
from fedlearn.learning.task import Batch, ClientData
from fedlearn.tasks import task_of

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.task import Task
    from fedlearn.study import Study

WAYS: Final = ("local only", "federated", "pooled")
COLOURS: Final = ("#9aa5b1", "#1f6feb", "#d9a441")
CHANCE: Final = {"auc": 0.5}
"""What guessing scores, where bars begin."""
_POOLED: Final = "pooled"


@dataclass(frozen=True)
class Comparison:
    """Scores of each client's own test rows by three models.

    Args:
        metric: the task's primary metric.
        test_rows: client to how many test rows it has.
        labels: client to how many of them have each label; empty where labels are no named classes.
        scores: client to way (`WAYS`) to the metric.
        identical: whether the simulation's weights are the given ones, byte for byte; None where the federation's chance was secret, so that
            nothing can repeat it.
    """

    metric: str
    test_rows: Mapping[str, int]
    labels: Mapping[str, Mapping[str, int]]
    scores: Mapping[str, Mapping[str, float]]
    identical: bool | None
    title: str = field(default="")

    def table(self) -> list[dict[str, Any]]:
        """One row a client."""
        return [
            {"client": c, "test rows": self.test_rows[c], **self.labels.get(c, {}), **scores}
            for c, scores in self.scores.items()
        ]

    def plot(self, path: Path | None = None) -> Any:
        """Bars by client and way, as a matplotlib figure; saved as PNG where a path is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(self.scores))
        base = CHANCE.get(self.metric, 0.0)
        for i, (way, colour) in enumerate(zip(WAYS, COLOURS, strict=True)):
            heights = np.array([s[way] for s in self.scores.values()])
            bars = axes.bar(places + (i - 1) * 0.27, heights - base, width=0.25, bottom=base, label=way, color=colour)
            axes.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=8, padding=2)
        axes.axhline(base, color="black", linewidth=0.8)
        axes.set_xticks(places, [self._tick(client) for client in self.scores])
        name = self.metric.upper() if len(self.metric) <= 3 else self.metric
        axes.set_ylabel(f"{name} ({base:g} is chance)" if base else name)
        axes.margins(y=0.15)
        axes.set_title(self.title, loc="left")
        axes.legend(frameon=False, ncols=3, loc="upper right")
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure

    def _tick(self, client: str) -> str:
        counts = ", ".join(f"{count} {label}" for label, count in self.labels.get(client, {}).items())
        return f"{client}\n{counts or f'{self.test_rows[client]} test rows'}"


@dataclass(frozen=True)
class Together(Population):
    """All clients' prepared rows as one client, each prepared at home, so that only the training differs."""

    def client(self, client_id: str) -> ClientData:
        if client_id != _POOLED:
            return super().client(client_id)
        parts = [super(Together, self).client(one) for one in self.rows]
        return ClientData(_join([part.train for part in parts]), _join([part.test for part in parts]))

    @cached_property
    def client_ids(self) -> Sequence[str]:
        return (_POOLED,)


def compare(study: Study, federated: bytes | None = None) -> Comparison:
    """Run a study three ways in this process.

    The budget is the same everywhere: rounds x epochs passes over whatever rows a way may use. Weights start equal, and each
    client's test rows are the ones that it holds out in the federation. Alone and pooled, nothing leaves and nothing is protected:
    they train as [train] says, without [privacy].

    Args:
        study: on data that ships with its task, with natural clients or made ones.
        federated: safetensors bytes of a federation's final model; the simulation's is taken without them. Where all chance follows from
            the seed, the two are compared.

    Raises:
        FedlearnError: as `simulate`.
    """
    from fedlearn.learning import local
    from fedlearn.learning.task import build_model
    from fedlearn.simulation.run import simulate_population

    study = study.model_copy(update={"environment": None})  # no way is helped or hindered
    task = task_of(study)
    population = build_population(study, task)
    quiet = study.with_overrides(["evaluate.every=0"])
    alone = type(study).model_validate(quiet.model_dump() | {"cohort": {}, "privacy": None, "secure_aggregation": {}})
    secret = study.privacy is not None and not study.privacy.seeded
    if federated is not None and secret:
        simulated: Arrays = arrays.from_bytes(federated)
    else:
        simulated = simulate_population(quiet, population).weights
    fields = {f.name: getattr(population, f.name) for f in dataclasses.fields(population) if f.name != "_cache"}
    pooled = simulate_population(alone, Together(**fields)).weights
    model = build_model(task, study.seed)

    def score(weights: Arrays, client: str) -> float:
        data = population.client(client).test
        found = local.evaluate(task, model, study.train, data, weights, study.evaluate.batch_size)
        return found.get(task.card.metric, float("nan"))

    scores = {}
    for client in population.client_ids:
        own = simulate_population(alone, population.only(client)).weights
        scores[client] = dict(zip(WAYS, (score(w, client) for w in (own, simulated, pooled)), strict=True))
    return Comparison(
        task.card.metric,
        {client: len(population.client(client).test) for client in population.rows},
        {client: _label_counts(task, population.client(client).test) for client in population.rows},
        scores,
        identical=None if federated is None or secret else arrays.to_bytes(simulated) == federated,
        title=study.description or study.name,
    )


def _join(batches: list[Batch]) -> Batch:
    groups = [b.groups for b in batches if b.groups is not None]
    return Batch(
        np.concatenate([b.x for b in batches]),
        np.concatenate([b.y for b in batches]),
        np.concatenate(groups) if groups else None,
    )


def _label_counts(task: Task, batch: Batch) -> dict[str, int]:
    names = task.label_names
    if not names or batch.y.ndim != 1:
        return {}
    return dict(zip(names, np.bincount(batch.y, minlength=len(names)).tolist(), strict=True))
