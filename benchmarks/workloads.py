"""The simulator's workloads: their models and data, as tasks of fedlearn and as plain arrays for everybody else.

W1: 1000 clients, 100 a round, 20 examples of 28 x 28 x 1 in 10 classes, CNN of 1.7 M parameters, 1 epoch, batch 10, SGD 0.1.
W2: 1000 clients, 200 a round, 64 examples of 30 features in 2 classes, MLP 30-64-32-2, 1 epoch, batch 16, SGD 0.1.
W3: W2, each update clipped to L2 1.0, noise multiplier 1.0 on the sum (client-level differential privacy).
W3b: W2, DP-SGD in each client: each example's gradient clipped to L2 1.0, noise multiplier 1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.local import Place, batch_rows
from fedlearn.learning.task import Examples, TaskCard
from fedlearn.study import Study
from fedlearn.tasks.classify import Classification

if TYPE_CHECKING:
    from pathlib import Path

    import torch

SEED = 7
DELTA_SHARE = 0.1
"""The delta of a plan times its units; without meaning here, but a plan names one."""


@dataclass(frozen=True)
class Workload:
    """What every contender runs.

    Args:
        task: one of this module's.
        cohort: clients a round.
        batch: local batch size.
        macs: multiplications of one example's forward pass, by layer.
        clip_l2: bound of a client's update (W3).
        record_clip_l2: bound of an example's gradient (W3b).
    """

    name: str
    task: str
    cohort: int
    batch: int
    macs: tuple[int, ...]
    clip_l2: float | None = None
    record_clip_l2: float | None = None
    noise_multiplier: float = 1.0
    lr: float = 0.1
    population: int = 1000

    @property
    def examples(self) -> int:
        """Of one client."""
        return TASKS[self.task].per_client

    @property
    def flops(self) -> int:
        """Floating-point operations of one round's training: forward, weights' gradients, inputs' gradients but the first layer's."""
        return 2 * self.cohort * self.examples * (3 * sum(self.macs) - self.macs[0])

    @property
    def privacy(self) -> dict[str, Any] | None:
        """The table [privacy] of W3 and W3b: noise is stated, not a budget. As many steps as without it, batches of that size on average."""
        noise = {"noise_multiplier": self.noise_multiplier}
        if self.clip_l2 is not None:
            units = self.population
            return noise | {"unit": "client", "clip_l2": self.clip_l2, "units": units, "delta": DELTA_SHARE / units}
        if self.record_clip_l2 is not None:
            units = self.examples
            steps = {"sampling_rate": self.batch / units, "steps": units // self.batch}
            table = {"unit": "record", "clip_l2": self.record_clip_l2, "units": units, "delta": DELTA_SHARE / units}
            return noise | table | steps
        return None

    def study(self, rounds: int, *, quiet: bool = False, **tables: Any) -> Study:
        """The study that fedlearn runs; `quiet` clips and adds no noise."""
        clipped = {"clip_l2": self.clip_l2} if quiet and self.clip_l2 is not None else {}
        train = {"lr": self.lr} if self.record_clip_l2 is not None else {"lr": self.lr, "batch_size": self.batch}
        tree: dict[str, Any] = {
            "name": self.name,
            "seed": SEED,
            "rounds": rounds,
            "task": {"name": f"benchmarks.workloads:{self.task}", "options": {"clients": self.population}},
            "data": {"folds": 1},
            "train": train,
            "cohort": {"size": self.cohort},
            "update": clipped,
            "privacy": None if quiet else self.privacy,
            "evaluate": {"every": 0},
        }
        return Study.model_validate(tree | tables)

    def rows_of(self, rounds: int) -> Iterator[list[tuple[int, np.ndarray]]]:
        """For each round, its clients and the order in which fedlearn's study feeds each one's rows: everybody uses the same."""
        study = self.study(rounds)
        names = [client_name(i) for i in range(self.population)]
        number = {name: i for i, name in enumerate(names)}
        for round_ in range(1, rounds + 1):
            clients = pick_cohort(names, self.cohort, SEED, "train", round_)
            yield [
                (
                    number[c],
                    np.concatenate(list(batch_rows(study.train, Place(SEED, round_, c), "global", self.examples))),
                )
                for c in clients
            ]


def client_name(number: int) -> str:
    """Sorts as the number does."""
    return f"c{number:07d}"


@dataclass(frozen=True)
class _Drawn(Classification):
    """Examples drawn from a seed, equally many a client."""

    clients: int = 1000

    per_client: ClassVar[int]
    shape: ClassVar[tuple[int, ...]]
    classes: ClassVar[int]
    card: ClassVar[TaskCard] = TaskCard(
        title="drawn", data="drawn", licence="none", synthetic=True, clients="drawn", metric="accuracy", obtain="drawn"
    )

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """x of shape (clients, per_client, ...) in float32, y of shape (clients, per_client) in int64."""
        g = np.random.default_rng(SEED)
        x = g.standard_normal((self.clients, self.per_client, *self.shape), dtype=np.float32)
        teacher = g.standard_normal((int(np.prod(self.shape)), self.classes)).astype(np.float32)
        y = (x.reshape(-1, teacher.shape[0]) @ teacher).argmax(axis=1)
        return x, y.reshape(self.clients, self.per_client).astype(np.int64)

    def load(self, source: Path | None = None) -> Examples:
        del source
        x, y = self.arrays()
        owner = np.repeat(np.array([client_name(i) for i in range(self.clients)]), self.per_client)
        return Examples(x.reshape(-1, *self.shape), y.reshape(-1), owner)


@dataclass(frozen=True)
class Images(_Drawn):
    """W1's task."""

    name: ClassVar[str] = "benchmarks.workloads:Images"
    per_client: ClassVar[int] = 20
    shape: ClassVar[tuple[int, ...]] = (1, 28, 28)
    classes: ClassVar[int] = 10

    def model(self) -> torch.nn.Module:
        from torch import nn

        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )


@dataclass(frozen=True)
class Rows(_Drawn):
    """W2's task."""

    hidden: tuple[int, ...] = (64, 32)

    name: ClassVar[str] = "benchmarks.workloads:Rows"
    per_client: ClassVar[int] = 64
    shape: ClassVar[tuple[int, ...]] = (30,)
    classes: ClassVar[int] = 2

    def model(self) -> torch.nn.Module:
        from torch import nn

        layers: list[nn.Module] = []
        width = 30
        for size in self.hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return nn.Sequential(*layers, nn.Linear(width, 2))


TASKS = {"Images": Images, "Rows": Rows}


@functools.cache
def arrays_of(task: str) -> tuple[np.ndarray, np.ndarray]:
    """A task's arrays, drawn once a process: what a worker that lives long would keep."""
    return TASKS[task]().arrays()


def first_model(workload: Workload) -> Any:
    """The module with the weights that fedlearn's study starts from."""
    from fedlearn.learning.task import build_model

    return build_model(TASKS[workload.task](), SEED)


def orders_of(workload: Workload, rounds: int) -> list[list[tuple[int, Any]]]:
    """Drawn beforehand, which favours the peers: fedlearn draws its cohorts and orders inside the measured rounds."""
    import torch

    return [[(c, torch.from_numpy(rows)) for c, rows in cohort] for cohort in workload.rows_of(rounds)]


_MLP_MACS = (30 * 64, 64 * 32, 32 * 2)
WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "Images", 100, 10, (784 * 25 * 32, 196 * 25 * 32 * 64, 3136 * 512, 5120)),
        Workload("W2", "Rows", 200, 16, _MLP_MACS),
        Workload("W3", "Rows", 200, 16, _MLP_MACS, clip_l2=1.0),
        Workload("W3b", "Rows", 200, 16, _MLP_MACS, record_clip_l2=1.0),
    )
}
