"""Clients' optimisers are torch's, without what torch's take to load."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedlearn.learning.optimizers import make_optimizer
from fedlearn.study import TrainTable


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("train", "reference"),
    [
        (TrainTable(lr=0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (
            TrainTable(lr=0.1, momentum=0.9, weight_decay=0.01),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
        ),
        (
            TrainTable(optimizer="adam", lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
        ),
        (
            TrainTable(optimizer="adamw", lr=0.01, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_steps_are_torchs_to_the_bit(train, reference, dtype):
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in [(3, 4), (5,), ()]]
    ours = [p.clone().requires_grad_(True) for p in start]
    theirs = [p.clone().requires_grad_(True) for p in start]
    optimizer, torchs = make_optimizer(train, ours), reference(theirs)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in start]
        kept = [g.clone() for g in gradients]
        optimizer.step(gradients)
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
        for parameter, gradient in zip(theirs, kept, strict=True):
            parameter.grad = gradient
        torchs.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_first_round_does_not_load_torchs_compiler():
    code = (
        "import sys, fedlearn; fedlearn.simulate('simulations/heart.toml', rounds=1); "
        "print([m for m in ('torch._dynamo', 'sympy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
