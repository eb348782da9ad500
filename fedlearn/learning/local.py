"""Local training: init, step, final, for one client at a time. The oracle that every faster engine must equal.

The model is functional here: weights are a name-to-tensor mapping that goes in and comes out. Randomness is derived from
(run seed, round, client, pass), so a client's result does not depend on who else trains, where, or in what order.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlearn import seeds
from fedlearn.errors import UnsupportedError, UpdateError
from fedlearn.learning.draws import may_draw, seeded
from fedlearn.learning.optimizers import ClientOptimizer, make_optimizer
from fedlearn.learning.rows import IntArray
from fedlearn.learning.strategy import MAIN, ClientStart, Strategy, Trained
from fedlearn.learning.task import Batch, ClientData, Task, build_model
from fedlearn.learning.update import Update
from fedlearn.privacy.study import without_clip

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.strategy import Direction, Tensors
    from fedlearn.privacy.dpsgd import GradientEngine
    from fedlearn.privacy.site import SitePlan
    from fedlearn.study import Study, TrainTable

log = logging.getLogger("fedlearn.learning")


@dataclass(frozen=True)
class Place:
    """Where in a study a piece of local work stands: all that its randomness depends on."""

    seed: int
    round: int
    client: str


@dataclass(frozen=True)
class FitResult:
    """What local training gives: the update that may leave, and the state that stays."""

    update: Update
    state: Mapping[str, Array]


def get_weights(model: torch.nn.Module) -> dict[str, Array]:
    """The model's trainable parameters as numpy arrays, in the module's order.

    Raises:
        UpdateError: the model has buffers that training changes (running statistics); they are no parameters, and
            averaging them is neither FedAvg nor private.
    """
    stateful = [name for name, buffer in model.named_buffers() if buffer.dtype.is_floating_point and "running" in name]
    if stateful:
        raise UpdateError(
            f"model: running statistics {stateful[:3]} cannot be federated", hint="use GroupNorm in place of BatchNorm"
        )
    return {name: p.detach().cpu().numpy().copy() for name, p in trainable(model).items()}


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name; frozen ones are the task's own and do not travel."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def initial_weights(task: Task, study: Study) -> dict[str, Array]:
    """The model before the first round: the task's own initialisation, drawn from the study's seed."""
    model = build_model(task, study.seed)
    return get_weights(model.double() if study.train.precision == "float64" else model)


def set_weights(model: torch.nn.Module, weights: Arrays) -> None:
    """Copy named arrays into the model's parameters.

    Raises:
        UpdateError: other names or shapes than the model's.
    """
    parameters = trainable(model)
    _check_fit(parameters, weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))  # a copy: torch wants it writable


def fit(
    task: Task,
    model: torch.nn.Module,
    strategy: Strategy,
    train: TrainTable,
    data: ClientData,
    *,
    place: Place,
    global_model: Arrays,
    shared: Arrays,
    state: Arrays,
    private: SitePlan | None = None,
    engine: GradientEngine | None = None,
) -> FitResult:
    """Train one client for one round.

    Args:
        task: gives the loss of each example.
        model: a module of the task's architecture, on the device to train on; its weights are overwritten.
        strategy: the client rule.
        train: local hyper-parameters.
        data: the client's prepared data.
        place: seed, round and client.
        global_model: global weights by name.
        shared: what the server broadcast beside them.
        state: the client's own memory from earlier rounds.
        private: train the pass that is released by DP-SGD; all that follows from its weights is post-processing.
        engine: its gradients', made for this model (`gradient_engine`); None makes one.

    Returns:
        The raw update (float arrays in the model's dtypes, on the CPU) and the client's new memory.
    """
    device = next(model.parameters()).device
    dtype = torch.float64 if train.precision == "float64" else torch.float32
    model.to(dtype)
    start = _start(global_model, shared, state, device)
    trained: dict[str, Trained] = {}
    facts: dict[str, float] = {}
    for one in strategy.client_passes(start):
        trainer = LocalTrainer(task, model, train, data.train, place, one.name)
        trainer.init(one.initial, one.direction)
        if private is not None and one.name == MAIN:
            trainer.run_privately(private, engine)
        else:
            trainer.run(telling=private is None)
        trained[one.name] = trainer.final()
        if one.name == MAIN and private is None:
            facts = {"loss": trainer.mean_loss, "steps": float(trainer.steps)}
    finish = strategy.client_finish(start, trained)
    releases = {name: _arrays(tensors) for name, tensors in finish.releases.items()}
    return FitResult(Update(releases, examples=len(data.train), facts=facts), _arrays(finish.state))


class LocalTrainer:
    """One pass of local training as init, step, final."""

    def __init__(
        self, task: Task, model: torch.nn.Module, train: TrainTable, data: Batch, place: Place, pass_name: str
    ) -> None:
        self._task, self._model, self._train, self._data = task, model, train, data
        self._place, self._pass = place, pass_name
        self._parameters = trainable(model)
        self._device = next(model.parameters()).device
        self._draws = may_draw(task, model)
        self._direction: Direction | None = None
        self._optimizer: ClientOptimizer | None = None
        self._loss_sum, self._loss_count = 0.0, 0
        self.steps = 0

    def init(self, weights: Tensors, direction: Direction | None) -> None:
        """Load the weights that this pass starts from, and a fresh optimiser.

        Raises:
            UpdateError: other names or shapes than the model's.
        """
        _check_fit(self._parameters, weights)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        self._direction = direction
        self._optimizer = make_optimizer(self._train, list(self._parameters.values()))

    def batches(self) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
        """Row numbers of each batch; see `batch_rows`."""
        return batch_rows(self._train, self._place, self._pass, len(self._data))

    def run(self, *, telling: bool = True) -> None:
        """All steps of the pass.

        Args:
            telling: raise what the task's own code raises. Otherwise such a batch is passed over: under a plan a pass beside the private one
                (Ditto's personal model) may not show what the rows hold either.
        """
        for rows in self.batches():
            try:
                self.step(rows)
            except Exception:
                if telling:
                    raise
                log.exception("pass %r: a batch of %d rows counts as nothing", self._pass, len(rows))

    def step(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """One optimiser step on the mean loss of a batch."""
        self._model.train()
        x, y = _to_device(self._data, rows, self._device, self._train.precision)
        parameters = list(self._parameters.values())
        with self._chance(), self._autocast():
            losses = self._task.loss(self._model(x), y)
            gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        self._descend(dict(zip(self._parameters, gradients, strict=True)))
        self._loss_sum += float(losses.detach().sum())
        self._loss_count += len(rows)

    def run_privately(self, private: SitePlan, engine: GradientEngine | None = None) -> None:
        """The steps of a plan: noisy gradients of Poisson batches, each followed like any other gradient.

        Raises:
            UnsupportedError: a layer has no per-example gradients, or the model mixes examples.
        """
        self._model.train()
        secret = private.chance.private
        gradients = private.gradients(
            self._model,
            lambda rows: self.losses(rows, secrets.randbits(63) if secret else None),
            len(self._data),
            engine if engine is not None else gradient_engine(self._task, self._model, self._train, self._data),
        )
        for _ in range(private.plan.steps):
            self._descend(gradients.gradient())

    def losses(self, rows: np.ndarray[Any, np.dtype[np.int64]], seed: int | None) -> torch.Tensor:
        """One loss an example.

        What layers draw must be secret where batches are: which mask a row gets depends on who is drawn before it, so under masks that are
        known one row more would change the gradients of all after it, and no clip bounds that.
        """
        x, y = _to_device(self._data, rows, self._device, self._train.precision)
        with self._chance(seed):
            return self._task.loss(self._model(x), y)

    def _descend(self, gradients: Tensors) -> None:
        assert self._optimizer is not None
        direction = gradients
        if self._direction is not None:
            weights = {name: p.detach() for name, p in self._parameters.items()}
            direction = self._direction(gradients, weights)
        self._optimizer.step([direction[name] for name in self._parameters])
        self.steps += 1

    def final(self) -> Trained:
        """The weights after the last step."""
        weights = {name: p.detach().clone() for name, p in self._parameters.items()}
        return Trained(weights, self.steps, self._train.lr)

    @property
    def mean_loss(self) -> float:
        """Mean training loss over all steps' examples; NaN without any."""
        return self._loss_sum / self._loss_count if self._loss_count else float("nan")

    def _chance(self, seed: int | None = None) -> contextlib.AbstractContextManager[None]:
        """Layers that draw (dropout) draw from this step's own seed, or a given one."""
        if not self._draws:
            return contextlib.nullcontext()
        place = self._place
        if seed is None:
            seed = seeds.derive(place.seed, "layers", place.round, place.client, self._pass, self.steps)
        return seeded(self._device, seed)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return _autocast(self._device, self._train.precision)


def gradient_engine(task: Task, model: torch.nn.Module, train: TrainTable, like: Batch) -> GradientEngine:
    """What sums a model's clipped per-example gradients, once it was tried on rows of nobody. One serves for all rounds.

    Args:
        task: gives the loss of each example.
        model: on the device to train on; its weights are what they are.
        train: the precision.
        like: the client's rows, whose shapes and dtypes are looked at, and nothing else.

    Raises:
        UnsupportedError: a layer has no per-example gradients, or the model mixes examples, or cannot be tried.
    """
    from fedlearn.privacy.dpsgd import engine_for
    from fedlearn.privacy.unfit import check_apart, stand_ins

    engine, nobody = engine_for(model), stand_ins(like)
    trainer = LocalTrainer(task, model, train, nobody, Place(0, 0, ""), MAIN)
    model.to(torch.float64 if train.precision == "float64" else torch.float32)
    try:
        with torch.no_grad():
            for training in (False, True):  # it is evaluated, too
                model.train(training)
                check_apart(lambda rows: trainer.losses(rows, seed=0), len(nobody))
        engine.check(lambda: trainer.losses(np.arange(len(nobody), dtype=np.int64), seed=0))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"task {task.name!r}: its model does not run on made-up rows: {type(error).__name__}: {error}",
            hint="under a privacy plan it is tried on numbers from 0 to 2, classes and tokens 0 and 1",
        ) from None
    return engine


def batch_rows(
    train: TrainTable, place: Place, pass_name: str, count: int
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Row numbers of each batch of one client's pass, for all epochs; the last batch of an epoch may be short.

    Args:
        train: batch size, epochs and the most steps.
        place: seed, round and client, which the order is drawn from.
        pass_name: of the pass.
        count: the client's training rows.
    """
    steps = 0
    for order in epoch_orders(train, place, pass_name, count):
        for first in range(0, count, train.batch_size):
            if steps == train.max_steps:
                return
            yield order[first : first + train.batch_size]
            steps += 1


def epoch_orders(
    train: TrainTable, place: Place, pass_name: str, count: int
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """The order of one client's rows in each epoch; see `batch_rows`."""
    generator = seeds.numpy_generator(place.seed, "batches", place.round, place.client, pass_name)
    for _ in range(train.epochs):
        yield generator.permutation(count)


def evaluate(
    task: Task,
    model: torch.nn.Module,
    train: TrainTable,
    data: Batch,
    weights: Arrays,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Metrics of given weights on a batch of examples, with the mean loss as "loss"; empty without examples."""
    if not len(data):
        return {}
    outputs, losses = predict(task, model, train, data, weights, batch_size)
    return {**task.metrics(outputs, data.y), "loss": float(losses.mean())}


def evaluate_noisily(
    task: Task,
    model: torch.nn.Module,
    study: Study,
    data: Batch,
    global_model: Arrays,
    at: tuple[int, str],
    *,
    rehearsal: bool,
) -> tuple[float, ...]:
    """Noisy sums of how the global model does on a client's test rows: `fedlearn.privacy.evaluation.noisy_sums`."""
    from fedlearn.privacy.evaluation import noisy_sums

    def outputs(rows: IntArray) -> Array:
        return predict(task, model, study.train, data.take(rows), global_model, study.evaluate.batch_size)[0]

    return noisy_sums(study, task.scoring(), outputs, data, at, rehearsal=rehearsal)


def predict(
    task: Task,
    model: torch.nn.Module,
    train: TrainTable,
    data: Batch,
    weights: Arrays,
    batch_size: int = 1024,
) -> tuple[Array, Array]:
    """The model's outputs, shape (n, ...), and losses, shape (n,), both as numpy arrays."""
    device = next(model.parameters()).device
    model.to(torch.float64 if train.precision == "float64" else torch.float32)
    set_weights(model, weights)
    model.eval()
    outputs, losses = [], []
    with torch.inference_mode(), _autocast(device, train.precision):
        for first in range(0, len(data), batch_size):
            rows = np.arange(first, min(first + batch_size, len(data)))
            x, y = _to_device(data, rows, device, train.precision)
            out = model(x)
            outputs.append(out.float().cpu().numpy())
            losses.append(task.loss(out, y).float().cpu().numpy())
    return np.concatenate(outputs), np.concatenate(losses)


def client_weights(strategy: Strategy, global_model: Arrays, shared: Arrays, state: Arrays) -> dict[str, Array]:
    """The weights that a client would use: the global ones, or its own where the strategy personalises."""
    cpu = torch.device("cpu")
    return _arrays(strategy.client_model(_start(global_model, shared, state, cpu)))


def _start(global_model: Arrays, shared: Arrays, state: Arrays, device: torch.device) -> ClientStart:
    return ClientStart(_tensors(global_model, device), _tensors(without_clip(shared), device), _tensors(state, device))


def _check_fit(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, Any]) -> None:
    """Refuse what torch would broadcast, or name in words that say nothing of the cause."""
    have = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    got = {name: tuple(array.shape) for name, array in weights.items()}
    if got != have:
        other = sorted(name for name in {**have, **got} if have.get(name) != got.get(name))[:3]
        raise UpdateError(
            f"model: got {', '.join(f'{n} {got.get(n)}' for n in other)}, "
            f"expected {', '.join(f'{n} {have.get(n)}' for n in other)}",
            hint="the server runs another model; check that both sides name the same task, options and version",
        )


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _to_device(
    data: Batch, rows: np.ndarray[Any, np.dtype[np.int64]], device: torch.device, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.from_numpy(data.x[rows]).to(device), torch.from_numpy(data.y[rows]).to(device)
    if precision == "float64" and x.dtype == torch.float32:
        x = x.double()
    if precision == "float64" and y.dtype == torch.float32:
        y = y.double()
    return x, y


def _tensors(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(a)).to(device) for name, a in arrays.items()}


def _arrays(tensors: Tensors) -> dict[str, Array]:
    return {name: t.detach().cpu().numpy().copy() for name, t in tensors.items()}
