"""Per-example gradients by Opacus: for layers that the fast engine has no rule for, and the check on those that it has.

Opacus takes seconds and hundreds of megabytes to load, so it is loaded when an engine is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fedlearn.errors import UnsupportedError
from fedlearn.privacy.ghost import ClippedSum, refuse_mixing
from fedlearn.privacy.gradient_rules import Gradients

if TYPE_CHECKING:
    from torch import nn


class OpacusGradients:
    """Clipped gradient sums from per-example gradients, held for one batch: simple, general, and large.

    Args:
        model: whatever `opacus.GradSampleModule` takes. Its hooks are there only while a batch is computed.

    Raises:
        UnsupportedError: Opacus refuses the model, or is not installed; the message says why.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_mixing(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its imports' deprecations
                from opacus.grad_sample import GradSampleModule
        except ImportError as error:
            raise UnsupportedError(
                f"model: a layer has no fast per-example gradients, and Opacus cannot be loaded: {error}",
                hint="pip install 'fedlearn[privacy]'; fedlearn check-model says which layer it is",
            ) from None
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._wrap: Callable[[], Any] = lambda: GradSampleModule(model, loss_reduction="sum")
        try:
            self._wrap().to_standard_module()
        except (NotImplementedError, ValueError, TypeError) as error:
            raise UnsupportedError(f"model: Opacus refuses it: {error}") from None

    def __call__(self, losses: Callable[[], torch.Tensor], clip_l2: float) -> ClippedSum:
        """As `GhostGradients`."""
        wrapped = self._wrap()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*backward hook.*")
                loss = losses()
                torch.autograd.backward(loss.sum())
            return self._sum(loss.detach(), clip_l2)
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None
            wrapped.to_standard_module()

    def check(self, losses: Callable[[], torch.Tensor]) -> None:
        """As `GhostGradients.check`; Opacus' hooks are its own to answer for, so the model is run once and no more."""
        self(losses, 1.0)

    def _sum(self, losses: torch.Tensor, clip_l2: float) -> ClippedSum:
        each: Gradients = {}
        for name, parameter in self._parameters.items():
            sample: Any = getattr(parameter, "grad_sample", None)
            if sample is None:
                sample = torch.zeros(len(losses), *parameter.shape, dtype=parameter.dtype, device=parameter.device)
            each[name] = torch.stack(sample).sum(0) if isinstance(sample, list) else sample
        with torch.no_grad():
            norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in each.values()]).norm(dim=0)
            good = torch.isfinite(norms) & torch.isfinite(losses)
            factors = torch.where(good, (clip_l2 / norms).clamp(max=1.0), torch.zeros_like(norms))
            sums = {}
            for name, g in each.items():
                kept = (
                    g
                    if bool(good.all())
                    else torch.where(good.reshape(-1, *[1] * (g.ndim - 1)), g, torch.zeros_like(g))
                )
                sums[name] = torch.tensordot(factors, kept, 1)
        count = int(good.sum())
        return ClippedSum(sums, count, len(losses) - count, int(((norms <= clip_l2) & good).sum()))
