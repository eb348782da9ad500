"""A long short-term memory from linear layers: torch's fused one has no per-example gradients."""

from __future__ import annotations

import torch
from torch import nn


class Lstm(nn.Module):
    """One layer of long short-term memory (Hochreiter and Schmidhuber 1997; forget gate of Gers et al. 2000).

    Args:
        features: width of the input at each step.
        width: of the state.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.from_input = nn.Linear(features, 4 * width)
        self.from_state = nn.Linear(width, 4 * width, bias=False)
        with torch.no_grad():  # remember, until it has learnt to forget (Jozefowicz et al. 2015)
            self.from_input.bias[width : 2 * width] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """States of shape (batch, time, width) from inputs of shape (batch, time, features)."""
        from_inputs = self.from_input(x)  # of all steps at once
        state = memory = x.new_zeros(x.shape[0], self.width)
        states = []
        for step in range(x.shape[1]):
            gates = from_inputs[:, step] + self.from_state(state)
            write, forget, candidate, show = gates.chunk(4, dim=1)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(write) * torch.tanh(candidate)
            state = torch.sigmoid(show) * torch.tanh(memory)
            states.append(state)
        return torch.stack(states, dim=1)


class RecurrentNet(nn.Module):
    """Tokens to logits over the next token at each place.

    Args:
        vocabulary: number of tokens.
        embedding: width of a token's vector.
        width: of the state.
        layers: of long short-term memory.
    """

    def __init__(self, vocabulary: int, embedding: int = 32, width: int = 128, layers: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.layers = nn.Sequential(*(Lstm(width if i else embedding, width) for i in range(layers)))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, time, vocabulary) from token ids of shape (batch, time)."""
        logits: torch.Tensor = self.head(self.layers(self.tokens(x)))
        return logits
