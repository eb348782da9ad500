"""Clients of any sizes, and models of every kind that the simulator's planner tells apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedlearn import seeds
from fedlearn.app import load_app
from fedlearn.data.population import build_population
from fedlearn.learning.federation import Federation, Outcome
from fedlearn.learning.local import initial_weights
from fedlearn.learning.task import Examples, Task, TaskCard
from fedlearn.models.cnn import ImageNet
from fedlearn.models.recurrent import RecurrentNet
from fedlearn.models.tabular import TabularNet
from fedlearn.models.transformer import CausalTransformer
from fedlearn.release.journal import DictJournal
from fedlearn.study import Study, parse_study

NAME = "tests.support.ragged_task:RaggedTask"
TOKENS = 5


class Residual(nn.Module):
    """Not a chain: what goes in is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.head(hidden + torch.tanh(self.second(hidden)))


class Mixing(nn.Module):
    """An example's output depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x - x.mean(0))


class Branching(nn.Module):
    """Looks at its data, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x * 0.5 if float(x.abs().max()) > 100 else x)


MODELS = {
    "linear": lambda: nn.Linear(6, 3),
    "tabular": lambda: TabularNet(6, 3, (5, 4), centre=0.1, scale=1.5),
    "relu": lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4, bias=False), nn.GELU(), nn.Linear(4, 3)),
    "residual": Residual,
    "mixing": Mixing,
    "branching": Branching,
    "dropout": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)),
    "cnn": lambda: ImageNet(1, 3, (4, 4), 2),
    "wide cnn": lambda: nn.Sequential(  # its first matrix is cheaper as thin products, for clients of few rows
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 48),
        nn.Tanh(),
        nn.Linear(48, 3),
    ),
    "lstm": lambda: RecurrentNet(TOKENS, 3, 4),
    "transformer": lambda: CausalTransformer(TOKENS, 4, 4, 2, 1),
}


@dataclass(frozen=True)
class RaggedTask(Task):
    """One client for each entry of `sizes`, with so many examples; where it is asked whose they are, three in a row are one owner's."""

    model_name: str = "tabular"
    sizes: tuple[int, ...] = (5, 1, 9, 4, 12, 3, 7, 2, 6, 8)
    owned: bool = False

    name: ClassVar[str] = NAME
    card: ClassVar[TaskCard] = TaskCard("ragged", "made here", "none", True, "a number", "accuracy", "included")

    def load(self, source=None):
        generator = seeds.numpy_generator(3, "ragged")
        client = np.repeat([f"c{i:03d}" for i in range(len(self.sizes))], self.sizes)
        count = len(client)
        owners = np.array([f"owner {i // 3}" for i in range(count)]) if self.owned else None
        if self.model_name in {"lstm", "transformer"}:
            tokens = generator.integers(0, TOKENS, size=(count, 5))
            return Examples(tokens[:, :-1].copy(), tokens[:, 1:].copy(), client, owners)
        shape = (1, 6, 6) if self.model_name in {"cnn", "wide cnn"} else (6,)
        x = generator.normal(size=(count, *shape)).astype(np.float32)
        return Examples(x, generator.integers(0, 3, size=count), client, owners)

    def for_units(self, group=""):
        return replace(self, owned=bool(group))

    def model(self):
        return MODELS[self.model_name]()

    def loss(self, outputs, y):
        if outputs.ndim == 3:
            return nn.functional.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)
        return nn.functional.cross_entropy(outputs, y, reduction="none")

    def metrics(self, outputs, y):
        return {"accuracy": float((outputs.argmax(-1) == y).mean())}


def ragged_study(*overrides: str) -> Study:
    """Five rounds; every row trains."""
    text = f"""
        name = "ragged"
        seed = 11
        rounds = 5
        [task]
        name = "{NAME}"
        [data]
        folds = 1
        [train]
        lr = 0.1
        batch_size = 4
        [evaluate]
        every = 0
    """
    return parse_study(text, overrides, origin="ragged.toml")


def population_of(study: Study):
    """Everybody's data."""
    options = dict(study.task.options)
    options["sizes"] = tuple(options.get("sizes", RaggedTask.sizes))
    return build_population(study, RaggedTask(**options))


def strategy_of(study: Study):
    """The study's strategy."""
    return load_app().strategy(study.strategy.name, study.strategy.options)


def outcome_of(study: Study, backend, emit=lambda event: None) -> Outcome:
    """The whole run on a backend."""
    population = population_of(study)
    federation = Federation(
        study,
        "run",
        strategy_of(study),
        initial_weights(population.task, study),
        backend,
        DictJournal(),
        metric="accuracy",
        emit=emit,
        may_join=False,
        rehearsal=True,
    )
    try:
        return federation.run()
    finally:
        backend.close()
