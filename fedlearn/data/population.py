"""From a study to clients' data: everybody's in a simulation, one site's own behind its firewall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlearn import seeds
from fedlearn.data.bootstrap import BootstrapRows
from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError
from fedlearn.learning.task import Population, Task

if TYPE_CHECKING:
    from pathlib import Path

    from fedlearn.study import Study


def build_population(study: Study, task: Task, source: Path | None = None) -> Population:
    """All clients of a study, from one file or from the data that ships with the task.

    Raises:
        DataError: the data cannot be read, or cannot be split as the study asks.
    """
    examples = task.load(source)
    split = study.data
    rows = make_partition(examples, split.partition, split.clients, study.seed, split.options)
    if isinstance(rows, BootstrapRows) and split.folds > 1:
        halves = task.split(examples, seeds.derive(study.seed, "split", "pool"), split.folds, split.fold)
        rows = rows.set_aside(*halves, split.folds)
    return Population(task, examples, rows, study.seed, split.folds, split.fold)


def site_population(study: Study, task: Task, client_id: str, source: Path | None) -> Population:
    """One site's own data as a population of one client.

    A file that names clients (a hospital column, say) must hold rows of `client_id`, and only those are used; in a file
    that names none, every row is this client's. Without a file, the client's share of the data that ships with the task
    is used: a rehearsal.

    Raises:
        DataError: the file is missing, does not fit the schema, or holds no row of this client.
    """
    if source is None:
        whole = build_population(study, task)
        if client_id not in whole.rows:
            raise DataError(
                f"client {client_id!r} is not one of this study's {len(whole.rows)} clients",
                hint=f"clients are {', '.join(whole.client_ids[:8])}" + (" ..." if len(whole.rows) > 8 else ""),
            )
        return whole.only(client_id)
    examples = task.load(source)
    rows = np.arange(len(examples), dtype=np.int64)
    if examples.client is not None:
        rows = np.flatnonzero(examples.client == client_id).astype(np.int64)
        if not len(rows):
            named = sorted({str(c) for c in examples.client})
            raise DataError(
                f"{source}: no rows of client {client_id!r}; the file holds {', '.join(named[:8])}",
                hint="start the client with one of these names, or leave the client column out of the file",
            )
    if not len(rows):
        raise DataError(f"{source}: no rows; expected at least one example")
    return Population(task, examples, {client_id: rows}, study.seed, study.data.folds, study.data.fold)
