"""A model as safetensors, TorchScript or ONNX; each is loaded back and compared before it is kept."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedlearn import arrays
from fedlearn.errors import DataError, StateError, UnsupportedError
from fedlearn.report.scoring import load_rows

if TYPE_CHECKING:
    import torch

    from fedlearn.report.scoring import TrainedModel

FORMATS: Final = ("safetensors", "torchscript", "onnx")
TOLERANCE: Final = 1e-4
"""Largest difference of an output, relative to the largest output: other runtimes add in another order."""
INPUT, OUTPUT = "features", "output"
_ROWS: Final = 3


def export_model(model: TrainedModel, kind: str, out: Path, data: Path | None = None) -> dict[str, Any]:
    """Write a model file.

    Args:
        model: from `open_model`.
        kind: one of `FORMATS`. safetensors holds the weights by name; the others hold the network too, with one input,
            prepared features of shape (rows, ...), and one output.
        out: the file; replaced when it exists.
        data: a file of the task, whose first rows the check takes; None for the data that ships with the task.

    Returns:
        `parameters`, `features` (shape of one row) and `largest_difference` from the model's own outputs.

    Raises:
        UnsupportedError: the format needs a package that is not installed, or its outputs differ.
        StateError: the file cannot be written.
        DataError: there is no data to check with.
    """
    import torch

    if kind not in FORMATS:
        raise UnsupportedError(f"format {kind!r}: expected one of {', '.join(FORMATS)}")
    features = torch.from_numpy(_sample(model, data))
    with torch.no_grad():
        expected = model.module(features).numpy()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / out.name
        with _quiet():
            if kind == "safetensors":
                made.write_bytes(arrays.to_bytes(model.weights))
                got = _from_weights(model, made, features)
            elif kind == "torchscript":
                got = _torchscript(model, made, features)
            else:
                got = _onnx(model, made, features)
        difference = float(np.abs(got - expected).max() / max(1.0, float(np.abs(expected).max())))
        if not difference <= TOLERANCE:
            raise UnsupportedError(f"{kind}: the exported model differs from the model by {difference:.2g}")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, out)
        except OSError as error:
            raise StateError(f"{out}: cannot be written: {error.strerror}") from None
    return {
        "parameters": sum(int(a.size) for a in model.weights.values()),
        "features": list(features.shape[1:]),
        "largest_difference": difference,
    }


def _sample(model: TrainedModel, data: Path | None) -> Any:
    """A few prepared rows."""
    task = model.task
    try:
        examples = load_rows(task, data)[0] if data is not None else task.load(None).whole()
    except DataError as error:
        hint = (
            error.hint if data is not None else "name a file of the task with --data: the export is checked on its rows"
        )
        raise DataError(error.message, hint=hint) from None
    rows = examples.take(np.arange(min(len(examples), _ROWS), dtype=np.int64))
    x = task.prepare(rows, rows).test.x
    return x.astype(np.float64) if model.study.train.precision == "float64" and x.dtype == np.float32 else x


def _from_weights(model: TrainedModel, made: Path, features: torch.Tensor) -> Any:
    import torch

    from fedlearn.learning.local import set_weights
    from fedlearn.learning.task import build_model

    again = build_model(model.task, model.study.seed + 1).to(next(model.module.parameters()).dtype)
    set_weights(again, arrays.from_bytes(made.read_bytes()))
    with torch.no_grad():
        return again.eval()(features).numpy()


def _torchscript(model: TrainedModel, made: Path, features: torch.Tensor) -> Any:
    import torch

    with torch.no_grad():
        torch.jit.trace(model.module, (features,)).save(str(made))  # type: ignore[no-untyped-call]
        return torch.jit.load(str(made))(features).numpy()  # type: ignore[no-untyped-call]


def _onnx(model: TrainedModel, made: Path, features: torch.Tensor) -> Any:
    import torch

    try:
        import onnx.reference
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise UnsupportedError(f"onnx: {error.name} is not installed", hint="pip install 'fedlearn[onnx]'") from None
    torch.onnx.export(
        model.module,
        (features,),
        made,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("rows")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return onnx.reference.ReferenceEvaluator(str(made)).run(None, {INPUT: features.numpy()})[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters announce their own future at length; that is no concern of who exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
