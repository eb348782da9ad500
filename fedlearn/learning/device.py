"""Where to train: the site's own choice."""

from __future__ import annotations

from fedlearn.errors import UnsupportedError


def resolve_device(name: str) -> str:
    """`auto`, `cpu` or `cuda:N` to a torch device that exists.

    Raises:
        UnsupportedError: the device is not there; says which are.
    """
    import torch

    count = torch.cuda.device_count()
    have = ["cpu", *(f"cuda:{i}" for i in range(count))]
    if name == "auto":
        return "cuda:0" if count else "cpu"
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in have:
        raise UnsupportedError(
            f"device {name!r} is not on this machine; it has {', '.join(have)}", hint="use --device auto"
        )
    return wanted
