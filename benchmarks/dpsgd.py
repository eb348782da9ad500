"""A DP-SGD step beside a plain one, and beside Opacus: CPU milliseconds of one core, and peak memory.

Steps of every kind are taken in turns in one process, and the least time of each counts; ratios are to the plain step of the same run. Noise
is drawn from the operating system's key, as in production. Peak memory is of a process of its own for each kind.

    python -m benchmarks.dpsgd [--models mlp,cnn,transformer,recurrent] [--steps 15] [--write]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import nn

from fedlearn.models.cnn import ImageNet
from fedlearn.models.recurrent import RecurrentNet
from fedlearn.models.transformer import CausalTransformer
from fedlearn.privacy.ghost import GhostGradients
from fedlearn.privacy.mechanisms import secret_chance

RESULTS = Path(__file__).resolve().parent / "results" / "dpsgd.md"
LIMITS = {"mlp": 1.5, "cnn": 2.5, "transformer": 2.5, "recurrent": 2.5}
MEMORY_LIMIT = 1.5


class Fused(nn.Module):
    """torch's own LSTM, which has no per-example gradients: what the recurrent net would cost without privacy."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.cell, self.head = (
            nn.Embedding(1000, 32),
            nn.LSTM(32, 128, batch_first=True),
            nn.Linear(128, 1000),
        )

    def forward(self, x):
        return self.head(self.cell(self.tokens(x))[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(1000, (64, 32)), torch.randint(1000, (64, 32))


MODELS = {
    "mlp": ("multi-layer net, 670k, batch 256", mlp, lambda: (torch.randn(256, 784), torch.randint(10, (256,)))),
    "cnn": (
        "CNN of 28 x 28, 26k, batch 64",
        lambda: ImageNet(1, 10),
        lambda: (torch.randn(64, 1, 28, 28), torch.randint(10, (64,))),
    ),
    "transformer": ("transformer of 32 tokens, 231k, batch 64", lambda: CausalTransformer(1000, 32), tokens),
    "recurrent": ("LSTM cell over 32 tokens, 243k, batch 64", lambda: RecurrentNet(1000), tokens),
}


class Steps:
    """One model's steps of every kind."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        _, make, data = MODELS[name]
        self.name, self.model, (self.x, self.y) = name, make(), data()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.named = dict(self.model.named_parameters())
        self.chance = secret_chance()
        self.engine = GhostGradients(self.model)
        self.fused: tuple[nn.Module, torch.optim.Optimizer] | None = None
        if name == "recurrent":
            fused = Fused()
            self.fused = fused, torch.optim.SGD(fused.parameters(), lr=0.01)

    def losses(self, model: nn.Module | None = None) -> torch.Tensor:
        out = (model or self.model)(self.x)
        each = nn.functional.cross_entropy(out.flatten(0, -2), self.y.flatten(), reduction="none").reshape(self.y.shape)
        return each.flatten(1).mean(1) if each.ndim > 1 else each

    def plain(self) -> None:
        self.optimizer.zero_grad()
        self.losses().mean().backward()
        self.optimizer.step()

    def private(self, clipped=None) -> None:
        self.optimizer.zero_grad()
        found = (clipped or self.engine)(self.losses, 1.0)
        for name, parameter in self.named.items():
            gradient = found.gradients[name].contiguous()
            self.chance.add_normal(gradient.numpy(), 1.0)
            parameter.grad = gradient.div_(len(self.x))
        self.optimizer.step()

    def opacus(self) -> None:
        from fedlearn.privacy.opacus import OpacusGradients

        if not hasattr(self, "theirs"):
            self.theirs = OpacusGradients(self.model)
        self.private(self.theirs)

    def torch_lstm(self) -> None:
        model, optimizer = self.fused
        optimizer.zero_grad()
        self.losses(model).mean().backward()
        optimizer.step()


class OpacusGhost:
    """Opacus' own ghost clipping, as its documentation sets it up."""

    def __init__(self, name: str) -> None:
        from opacus import PrivacyEngine

        steps = Steps(name)
        data = torch.utils.data.TensorDataset(steps.x, steps.y)
        loader = torch.utils.data.DataLoader(data, batch_size=len(steps.x))
        self.x, self.y = steps.x, steps.y
        self.model, self.optimizer, self.criterion, _ = PrivacyEngine().make_private(
            module=steps.model,
            optimizer=steps.optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
            criterion=nn.CrossEntropyLoss(reduction="mean"),
            poisson_sampling=False,
        )

    def __call__(self) -> None:
        out = self.model(self.x)
        target = self.y
        if out.ndim > 2:
            out = out.transpose(1, 2)
        self.optimizer.zero_grad()
        self.criterion(out, target).backward()
        self.optimizer.step()


def measure(name: str, count: int) -> dict[str, float]:
    """Least milliseconds of each kind of step, in turns."""
    steps = Steps(name)
    kinds = {"plain": steps.plain, "private": steps.private, "opacus hooks": Steps(name).opacus}
    if steps.fused:
        kinds["torch's LSTM"] = steps.torch_lstm
    if name == "mlp":
        kinds["opacus ghost"] = OpacusGhost(name)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(count + 2):
        for kind, step in kinds.items():
            if kind == "opacus hooks" and turn > 4:
                continue
            start = time.process_time()
            step()
            if turn > 1:
                times[kind].append(time.process_time() - start)
    return {kind: 1000 * min(found) for kind, found in times.items()}


def memory(name: str) -> float:
    """What private steps add to the process at their peak, over what plain ones add: activations, gradients, code that is loaded."""
    grown = {}
    for kind in ("plain", "private"):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.dpsgd", "--memory-of", f"{name}:{kind}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parents[2])
        grown[kind] = float(done.stdout)
    return grown["private"] / grown["plain"]


def peak(name: str, kind: str) -> int:
    """KiB that steps add to the process at their peak."""
    steps = Steps(name)
    before = status("VmRSS")
    for _ in range(4):
        getattr(steps, kind)()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A figure of this process, KiB. (What getrusage says is inherited from the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.memory_of:
        print(peak(*asked.memory_of.split(":")))
        return 0
    warnings.simplefilter("ignore")
    lines = [
        f"# A DP-SGD step\n\ntorch {torch.__version__}, {platform.machine()}, one core; `python -m benchmarks.dpsgd`.\n",
        "| model | plain, ms | private, ms | ratio | at most | Opacus' per-example gradients | peak memory of a step | beside |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    held = True
    for name in asked.models.split(","):
        found = measure(name, asked.steps)
        ratio, more = found["private"] / found["plain"], memory(name)
        held &= ratio <= LIMITS[name] and more <= MEMORY_LIMIT
        others = "; ".join(
            f"{kind}: {found[kind]:.1f} ms, {found[kind] / found['plain']:.2f} x plain"
            for kind in ("opacus ghost", "torch's LSTM")
            if kind in found
        )
        lines.append(
            f"| {MODELS[name][0]} | {found['plain']:.1f} | {found['private']:.1f} | {ratio:.2f} | {LIMITS[name]} | "
            f"{found['opacus hooks'] / found['plain']:.1f} x | {more:.2f} x | {others} |"
        )
        print(lines[-1], flush=True)
    if asked.write:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
