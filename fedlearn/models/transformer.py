"""A small causal transformer over tokens, to be read in one sitting.

Attention is made of linear layers, normalisation is per token, the head is not tied to the embedding: so every layer has
per-example gradients, and nothing mixes the examples of a batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2).

    Args:
        width: of a token's vector.
        heads: how many; divides the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same shape; a place sees itself and what is before it."""
        batch, time, width = x.shape
        split = (batch, time, self.heads, width // self.heads)
        q, k, v = (layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: torch.Tensor = self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return mixed


class Block(nn.Module):
    """Attention, then a feed-forward net at each place; each adds to what came in, normalised first (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same shape."""
        x = x + self.attention(self.norm_attention(x))
        out: torch.Tensor = x + self.feed(self.norm_feed(x))
        return out


class CausalTransformer(nn.Module):
    """Tokens to logits over the next token at each place.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width: of a token's vector.
        heads: of attention.
        blocks: how many.
    """

    def __init__(self, vocabulary: int, context: int, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, time, vocabulary) from token ids of shape (batch, time)."""
        # One row of places per example: a layer that saw no batch dimension would have no per-example gradient.
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))
        return logits
