"""torch's fused layers from linear ones, which have per-example gradients: drop-in, with the same outputs to rounding.

`Recurrent.of` takes over an `nn.RNN`, `nn.GRU` or `nn.LSTM`, `Attention.of` an `nn.MultiheadAttention`. They are called like what they
replace, and compute with one row for each example inside, wherever the batch dimension is outside. They take their time: a fused kernel has no steps
that a gradient could be caught at.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from fedlearn.errors import UnsupportedError

_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class _Direction(nn.Module):
    """One layer of one direction. Gates are in torch's order: LSTM input, forget, cell, output; GRU reset, update, new.

    The two biases that torch adds up are one here, but for the GRU's, where the reset gate stands between them.
    """

    def __init__(self, mode: str, features: int, width: int, projection: int, *, bias: bool) -> None:
        super().__init__()
        self.mode = mode
        self.from_input = nn.Linear(features, _GATES[mode] * width, bias=bias)
        self.from_state = nn.Linear(projection or width, _GATES[mode] * width, bias=bias and mode == "GRU")
        self.projection = nn.Linear(width, projection, bias=False) if projection else None

    def forward(self, x: torch.Tensor, state: torch.Tensor, memory: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """States of shape (batch, time, width), the last state, and the last memory of an LSTM."""
        from_inputs = self.from_input(x)  # of all steps at once
        states = []
        for step in range(x.shape[1]):
            entering, coming = from_inputs[:, step], self.from_state(state)
            if self.mode == "LSTM":
                assert memory is not None
                write, forget, candidate, show = (entering + coming).chunk(4, dim=1)
                memory = torch.sigmoid(forget) * memory + torch.sigmoid(write) * torch.tanh(candidate)
                state = torch.sigmoid(show) * torch.tanh(memory)
                state = state if self.projection is None else self.projection(state)
            elif self.mode == "GRU":
                (r_in, z_in, n_in), (r, z, n) = entering.chunk(3, dim=1), coming.chunk(3, dim=1)
                keep = torch.sigmoid(z_in + z)
                state = (1 - keep) * torch.tanh(n_in + torch.sigmoid(r_in + r) * n) + keep * state
            else:
                state = (torch.tanh if self.mode == "RNN_TANH" else torch.relu)(entering + coming)
            states.append(state)
        found = torch.stack(states, dim=1)
        return (found, state) if memory is None else (found, state, memory)


class Recurrent(nn.Module):
    """`nn.RNN`, `nn.GRU` or `nn.LSTM` from linear layers. Use `of`.

    Called as torch's: `output, state = layer(x, state)`, batched. Packed sequences are refused.
    """

    def __init__(self, like: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.batch_first, self.dropout = like.mode, like.batch_first, float(like.dropout)
        self.hidden_size, self.num_layers, self.proj_size = like.hidden_size, like.num_layers, like.proj_size
        self.directions = 2 if like.bidirectional else 1
        wide = (like.proj_size or like.hidden_size) * self.directions
        self.cells = nn.ModuleList(
            _Direction(like.mode, wide if layer else like.input_size, like.hidden_size, like.proj_size, bias=like.bias)
            for layer in range(like.num_layers)
            for _ in range(self.directions)
        )

    @classmethod
    def of(cls, like: nn.RNNBase) -> Recurrent:
        """The same layer with the same weights, on the same device; what is frozen stays so."""
        new = cls(like)
        with torch.no_grad():
            for index, cell in enumerate(new.cells):
                assert isinstance(cell, _Direction)
                name = f"l{index // new.directions}" + ("_reverse" if index % new.directions else "")
                _take(cell.from_input.weight, getattr(like, f"weight_ih_{name}"))
                _take(cell.from_state.weight, getattr(like, f"weight_hh_{name}"))
                if cell.projection is not None:
                    _take(cell.projection.weight, getattr(like, f"weight_hr_{name}"))
                if like.bias:
                    first, second = getattr(like, f"bias_ih_{name}"), getattr(like, f"bias_hh_{name}")
                    if like.mode == "GRU":
                        _take(cell.from_input.bias, first)
                        _take(cell.from_state.bias, second)
                    else:
                        _take(cell.from_input.bias, first + second, trains=first.requires_grad)
        return new.train(like.training)

    def forward(self, x: torch.Tensor, hx: Any = None) -> tuple[torch.Tensor, Any]:
        """As torch's, for x of shape (batch, time, features), or (time, batch, features) without `batch_first`."""
        if not isinstance(x, torch.Tensor) or x.ndim != 3:
            raise UnsupportedError(
                f"Recurrent: got {'a packed sequence' if not isinstance(x, torch.Tensor) else f'shape {tuple(x.shape)}'}, "
                "expected a batch of sequences",
                hint="pad sequences to one length",
            )
        x = x if self.batch_first else x.transpose(0, 1)
        states, memories = self._first(x, hx)
        last = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                memory = None if memories is None else memories[index]
                found, *ends = self.cells[index](x.flip(1) if direction else x, states[index], memory)
                outs.append(found.flip(1) if direction else found)
                last.append(ends)
            x = torch.cat(outs, dim=2)
            if self.dropout and layer + 1 < self.num_layers:
                x = functional.dropout(x, self.dropout, self.training)
        ends_of = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        return x if self.batch_first else x.transpose(0, 1), ends_of if self.mode == "LSTM" else ends_of[0]

    def _first(self, x: torch.Tensor, hx: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States and memories to start from, shape (layers x directions, batch, width)."""
        if hx is not None:
            return hx if self.mode == "LSTM" else (hx, None)
        count = self.num_layers * self.directions
        states = x.new_zeros(count, len(x), self.proj_size or self.hidden_size)
        return states, x.new_zeros(count, len(x), self.hidden_size) if self.mode == "LSTM" else None

    def flatten_parameters(self) -> None:
        """Nothing to do: no fused kernel reads these weights."""


class Attention(nn.Module):
    """`nn.MultiheadAttention` from linear layers. Use `of`."""

    in_proj_bias = None
    """What torch's encoder looks at to choose its fused path, which it must not."""

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = like.embed_dim, like.num_heads, like.head_dim
        self.dropout, self.batch_first = float(like.dropout), like.batch_first
        bias = like.in_proj_bias is not None
        self.from_query = nn.Linear(like.embed_dim, like.embed_dim, bias=bias)
        self.from_key = nn.Linear(like.kdim or like.embed_dim, like.embed_dim, bias=bias)
        self.from_value = nn.Linear(like.vdim or like.embed_dim, like.embed_dim, bias=bias)
        self.out_proj = nn.Linear(like.embed_dim, like.embed_dim, bias=like.out_proj.bias is not None)

    @staticmethod
    def can_replace(like: nn.MultiheadAttention) -> bool:
        """False with keys and values that are parameters of their own: they are of no example."""
        return like.bias_k is None and not like.add_zero_attn

    @classmethod
    def of(cls, like: nn.MultiheadAttention) -> Attention:
        """The same layer with the same weights, on the same device; what is frozen stays so."""
        new = cls(like)
        whole = like.in_proj_weight
        weights = (
            (like.q_proj_weight, like.k_proj_weight, like.v_proj_weight) if whole is None else whole.detach().chunk(3)
        )
        with torch.no_grad():
            layers = (new.from_query, new.from_key, new.from_value)
            for layer, weight in zip(layers, weights, strict=True):
                _take(layer.weight, weight, trains=(weight if whole is None else whole).requires_grad)
            if like.in_proj_bias is not None:
                for layer, part in zip(layers, like.in_proj_bias.chunk(3), strict=True):
                    _take(layer.bias, part, trains=like.in_proj_bias.requires_grad)
            _take(new.out_proj.weight, like.out_proj.weight)
            if like.out_proj.bias is not None:
                _take(new.out_proj.bias, like.out_proj.bias)
        return new.train(like.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,  # torch's signature
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,  # as above
        is_causal: bool = False,  # noqa: ARG002  # a hint; the mask says it
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As torch's, for batches."""
        if query.ndim != 3:
            raise UnsupportedError(f"Attention: got shape {tuple(query.shape)}, expected a batch of sequences")
        if not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = (
            self._heads(self.from_query(query)),
            self._heads(self.from_key(key)),
            self._heads(self.from_value(value)),
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(len(q), self.num_heads, *attn_mask.shape[1:])
            scores = scores + _added(mask, scores)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask[:, None, None, :], scores)
        weights = scores.softmax(dim=3)
        mixed = functional.dropout(weights, self.dropout, self.training) @ v
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        out = out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, places, width) to (batch, heads, places, width of a head)."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def _added(mask: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A mask as what is added to scores: True stands for minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(scores)
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf)


def _take(to: torch.Tensor, value: torch.Tensor, *, trains: bool | None = None) -> None:
    to.data = value.detach().clone()
    to.requires_grad_(value.requires_grad if trains is None else trains)
