"""Partitions: which rows are whose. Each is a pure function of labels or features, a number of clients and a seed.

Every partition gives one int64 array of row numbers a client, ascending; every row is used exactly once, and no client is
empty. All are vectorised over the clients and keep two numbers a client and row at most: a million clients take a second. The exception is
`bootstrap`: its clients draw from the pool with replacement, share rows, and cost nothing.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.data.bootstrap import BootstrapRows, bootstrap_rows
from fedlearn.data.compact import CompactRows, Partition
from fedlearn.errors import DataError, StudyError
from fedlearn.learning.rows import ClientRows, IntArray, ListedIds, NumberedIds
from fedlearn.learning.task import Examples


def natural(client: npt.NDArray[np.str_]) -> CompactRows:
    """The clients that the data itself names, in alphabetical order of their ids.

    Args:
        client: the natural client of each row, shape (n,).
    """
    names, owner = np.unique(client_ids(client), return_inverse=True)
    return CompactRows(ListedIds(names.tolist()), Partition.of_owners(owner, len(names)))


def iid(rows: int, clients: int, seed: int) -> Partition:
    """Rows dealt at random; sizes differ by one at most."""
    _enough(rows, clients, 1)
    owner = np.arange(rows, dtype=np.int64) % clients
    seeds.numpy_generator(seed, "partition", "iid").shuffle(owner)
    return Partition.of_owners(owner, clients)


def dirichlet(labels: npt.NDArray[Any], clients: int, seed: int, *, alpha: float = 0.5, min_size: int = 1) -> Partition:
    """Label skew: each label's rows are spread over the clients by shares drawn from Dirichlet(alpha).

    Hsu, Qi and Brown 2019, and the variant over labels of Yurochkin et al. 2019. Small alpha: a client has few labels;
    large alpha: nearly IID. Clients below `min_size` then get rows from the largest ones; redrawing until all are large
    enough, as is common, does not end for many clients.

    Args:
        labels: class of each row, integer, shape (n,).
        clients: how many.
        seed: of the draw.
        alpha: concentration, above 0.
        min_size: rows that each client has at least.
    """
    _positive("alpha", alpha)
    _enough(len(labels), clients, min_size)
    classes = _class_ids(labels, "dirichlet")
    g = seeds.numpy_generator(seed, "partition", "dirichlet")
    owner = np.empty(len(labels), dtype=np.int64)
    for label in range(int(classes.max()) + 1):
        mine = g.permutation(np.flatnonzero(classes == label))
        owner[mine] = _spread(len(mine), _shares(g, clients, alpha))
    return Partition.of_owners(_level(owner, clients, min_size, g), clients)


def shards(labels: npt.NDArray[Any], clients: int, seed: int, *, shards_per_client: int = 2) -> Partition:
    """Rows sorted by label, cut into equal shards, a few shards dealt to each client.

    McMahan et al. 2017, section 3, the "pathological non-IID" partition of MNIST: with two shards most clients see two labels.

    Args:
        labels: class or value of each row, shape (n,).
        clients: how many.
        seed: of the deal.
        shards_per_client: how many shards each client gets.
    """
    if shards_per_client < 1:
        raise StudyError(f"shards_per_client: got {shards_per_client}, expected 1 or more")
    _enough(len(labels), clients, shards_per_client)
    _one_dimensional(labels, "shards")
    g = seeds.numpy_generator(seed, "partition", "shards")
    shuffled = g.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    count = clients * shards_per_client
    shard = np.arange(len(labels), dtype=np.int64) * count // len(labels)
    holder = g.permutation(np.arange(count, dtype=np.int64) % clients)
    owner = np.empty(len(labels), dtype=np.int64)
    owner[by_label] = holder[shard]
    return Partition.of_owners(owner, clients)


def quantity(rows: int, clients: int, seed: int, *, alpha: float = 0.5, min_size: int = 1) -> Partition:
    """Quantity skew: client sizes by shares drawn from Dirichlet(alpha), rows at random. Li et al. 2022 (NIID-Bench).

    Args:
        rows: how many rows there are.
        clients: how many.
        seed: of the draw.
        alpha: concentration, above 0; small means few large clients.
        min_size: rows that each client has at least.
    """
    _positive("alpha", alpha)
    _enough(rows, clients, min_size)
    g = seeds.numpy_generator(seed, "partition", "quantity")
    owner = np.empty(rows, dtype=np.int64)
    owner[g.permutation(rows)] = _spread(rows, _shares(g, clients, alpha))
    return Partition.of_owners(_level(owner, clients, min_size, g), clients)


def feature_shift(
    x: npt.NDArray[Any], clients: int, seed: int, *, feature: int | None = None, mixing: float = 0.0
) -> Partition:
    """Feature shift: clients hold consecutive quantiles of one feature, the lowest values at the first client.

    Args:
        x: features, shape (n, ...); a missing value counts as the median.
        clients: how many.
        seed: breaks ties, and picks the rows that are mixed.
        feature: position in the flattened features; None takes the mean over all of them (an image's brightness).
        mixing: share of rows, 0 to 1, that go to a random client instead; 1 is IID.
    """
    _enough(len(x), clients, 1)
    if not 0 <= mixing <= 1:
        raise StudyError(f"mixing: got {mixing}, expected 0 to 1")
    flat = x.reshape(len(x), -1)
    if feature is not None and not 0 <= feature < flat.shape[1]:
        raise StudyError(f"feature: got {feature}, expected 0 to {flat.shape[1] - 1}")
    values = (flat if feature is None else flat[:, feature : feature + 1]).astype(np.float64)
    present = ~np.isnan(values)
    counts = present.sum(axis=1)
    score = np.where(present, values, 0).sum(axis=1) / np.maximum(counts, 1)
    known = counts > 0
    score[~known] = np.median(score[known]) if known.any() else 0.0
    g = seeds.numpy_generator(seed, "partition", "feature_shift")
    shuffled = g.permutation(len(x))
    order = shuffled[np.argsort(score[shuffled], kind="stable")]
    mixed = np.sort(g.permutation(len(x))[: round(mixing * len(x))])
    order[mixed] = g.permutation(order[mixed])
    owner = np.empty(len(x), dtype=np.int64)
    owner[order] = np.arange(len(x), dtype=np.int64) * clients // len(x)
    return Partition.of_owners(owner, clients)


def bootstrap(
    rows: int,
    labels: npt.NDArray[Any],
    clients: int,
    seed: int,
    *,
    examples_per_client: int = 32,
    alpha: float | None = None,
) -> BootstrapRows:
    """Each client draws rows of the pool by itself, with replacement: clients may outnumber rows, and none is stored.

    Hsu, Qi and Brown 2019, section 3, without exhausting the pool. Test rows are set aside once for all clients, since they share rows.

    Args:
        rows: how many rows there are.
        labels: class of each row, integer, shape (n,); not looked at without `alpha`.
        clients: how many; a larger population begins with the clients of a smaller one.
        seed: of the draws.
        examples_per_client: rows of each client, training and test.
        alpha: label skew: concentration of the Dirichlet distribution of a client's label shares around the pool's; None for none.
    """
    if examples_per_client < 1 or clients < 1:
        raise StudyError(
            f"bootstrap: got {clients} clients of {examples_per_client} examples, expected 1 or more of both"
        )
    _enough(rows, 1, 1)
    if alpha is not None:
        _positive("alpha", alpha)
    classes = None if alpha is None else _class_ids(labels, "bootstrap")
    return bootstrap_rows(rows, classes, clients, seed, examples_per_client=examples_per_client, alpha=alpha)


_MADE: Final[Mapping[str, Callable[..., Partition]]] = {
    "iid": lambda e, clients, seed, **o: iid(len(e), clients, seed, **o),
    "dirichlet": lambda e, clients, seed, **o: dirichlet(e.y, clients, seed, **o),
    "shards": lambda e, clients, seed, **o: shards(e.y, clients, seed, **o),
    "quantity": lambda e, clients, seed, **o: quantity(len(e), clients, seed, **o),
    "feature_shift": lambda e, clients, seed, **o: feature_shift(e.x, clients, seed, **o),
}
_RULES: Final[Mapping[str, Callable[..., Any]]] = {
    "natural": natural,
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "feature_shift": feature_shift,
    "bootstrap": bootstrap,
}


def partition_names() -> tuple[str, ...]:
    """Names of the partitions, as in a study."""
    return tuple(_RULES)


def make_partition(
    examples: Examples, name: str, clients: int | None, seed: int, options: Mapping[str, Any] | None = None
) -> ClientRows:
    """A partition by its name (`[data]` in a study).

    Args:
        examples: everybody's rows.
        name: one of `partition_names()`.
        clients: how many clients to make; None for the natural partition, which takes those that the data names.
        seed: the study's.
        options: keyword arguments of the partition of that name.

    Returns:
        Client id to its rows. Natural ids are the data's own in lower case ("va-long-beach"); made ones "client-0000" and up.

    Raises:
        StudyError: unknown partition or option, or one that this data cannot have.
        DataError: more clients than rows allow, or data that names no clients.
    """
    options = dict(options or {})
    _check_options(name, options)
    if name == "natural":
        if clients is not None:
            raise StudyError(f"natural partition: got clients = {clients}, expected none: the data names its clients")
        if examples.client is None:
            raise DataError(
                "natural partition: this data names no clients",
                hint="choose partition = iid, dirichlet, shards, quantity, feature_shift or bootstrap",
            )
        return natural(examples.client)
    if clients is None:
        raise StudyError(f"{name} partition: got no number of clients, expected clients = 1 or more")
    if name == "bootstrap":
        return bootstrap(len(examples), examples.y, clients, seed, **options)
    parts = _MADE[name](examples, clients, seed, **options)
    return CompactRows(NumberedIds(clients), parts)


def client_id(name: str) -> str:
    """A name as an id: lower case, anything but letters, digits, dot and underscore becomes a hyphen."""
    return re.sub(r"[^\w.]+", "-", name.strip().lower()).strip("-") or "client"


def client_ids(names: npt.NDArray[np.str_], *, merge: bool = False) -> npt.NDArray[np.str_]:
    """The id of each row's client from its name; see `client_id`.

    Args:
        names: of each row.
        merge: names that share an id are one client's: in a site's own file, where spellings differ.

    Raises:
        DataError: two names would share an id.
    """
    distinct, owner = np.unique(names, return_inverse=True)
    ids = [client_id(str(name)) for name in distinct]
    if len(set(ids)) < len(ids) and not merge:
        twice = next(i for i in ids if ids.count(i) > 1)
        same = [str(name) for name, i in zip(distinct, ids, strict=True) if i == twice]
        raise DataError(f"client names {same} share the id {twice!r}; expected names that differ in letters or digits")
    return np.array(ids, dtype=np.str_)[owner]


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    if name not in _RULES:
        near = difflib.get_close_matches(name, _RULES, n=1)
        raise StudyError(
            f"unknown partition {name!r}",
            hint=f"did you mean {near[0]!r}?" if near else f"partitions: {', '.join(_RULES)}",
        )
    valid = [key for key, p in inspect.signature(_RULES[name]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for key, value in options.items():
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.4)
            raise StudyError(
                f"{name} partition: unknown option {key!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"valid options: {', '.join(valid) or 'none'}",
            )
        whole = key in {"min_size", "shards_per_client", "feature", "examples_per_client"}
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise StudyError(
                f"{name} partition: option {key!r}: got {value!r}, expected a {'whole ' if whole else ''}number"
            )


def _shares(g: np.random.Generator, clients: int, alpha: float) -> npt.NDArray[np.float64]:
    shares = g.dirichlet(np.full(clients, alpha))
    if not np.isfinite(shares).all() or shares.sum() == 0:  # every gamma draw underflowed: the limit is one client
        shares = np.zeros(clients)
        shares[g.integers(clients)] = 1.0
    return shares


def _spread(rows: int, shares: npt.NDArray[np.float64]) -> IntArray:
    """Owners of so many rows, cut at the cumulative shares."""
    ends = np.rint(np.cumsum(shares) / shares.sum() * rows).astype(np.int64)
    ends[-1] = rows
    return np.repeat(np.arange(len(shares), dtype=np.int64), np.diff(ends, prepend=0))


def _level(owner: IntArray, clients: int, min_size: int, g: np.random.Generator) -> IntArray:
    """Fill clients up to `min_size` with rows that the largest clients give, down to one common level."""
    sizes = np.bincount(owner, minlength=clients)
    lacking = np.maximum(min_size - sizes, 0)
    needed = int(lacking.sum())
    if needed == 0:
        return owner
    low, high = min_size, int(sizes.max())  # the highest level at which the rows above it suffice
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= needed else (low, middle - 1)
    shuffled = g.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(owner)) - np.repeat(starts, sizes)
    above = rank >= low
    # Rows with the highest rank go first, so that the largest clients give most.
    givers = grouped[above][np.argsort(-rank[above], kind="stable")][:needed]
    out = owner.copy()
    out[givers] = np.repeat(np.arange(clients, dtype=np.int64), lacking)
    return out


def _class_ids(labels: npt.NDArray[Any], name: str) -> IntArray:
    _one_dimensional(labels, name)
    if labels.dtype.kind == "f":
        raise StudyError(
            f"{name} partition: got labels of dtype {labels.dtype}, expected classes",
            hint="for a regression use iid, quantity, shards or feature_shift",
        )
    ids: IntArray = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return ids


def _one_dimensional(labels: npt.NDArray[Any], name: str) -> None:
    if labels.ndim != 1:
        raise StudyError(
            f"{name} partition: got labels of shape {labels.shape}, expected one label a row",
            hint="use the natural, iid or quantity partition",
        )


def _enough(rows: int, clients: int, each: int) -> None:
    if clients < 1 or each < 1:
        raise StudyError(f"partition: got {clients} clients with at least {each} rows each, expected 1 or more of both")
    if rows < clients * each:
        raise DataError(
            f"partition: got {rows} rows for {clients} clients with at least {each} each, which needs {clients * each}",
            hint=f"this data allows {rows // each} clients at most" if rows >= each else "this data is too small",
        )


def _positive(name: str, value: float) -> None:
    if not value > 0 or not np.isfinite(value):
        raise StudyError(f"{name}: got {value}, expected a number above 0")
