"""The language model of 15 million parameters of llama2.c (Karpathy, 2023)."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Llama"]


class Layer(nn.Module):
    """Attention with rotary positions, and a gated layer; each behind a norm, beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.mixed = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """Return the layer's outputs, (n, length, width)."""
        n, length, width = x.shape
        parts = self.attention(self.attention_norm(x)).view(n, length, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            _turned(queries, turns), _turned(keys, turns), values, is_causal=True
        )
        x = x + self.mixed(mixed.transpose(1, 2).reshape(n, length, width))
        inner = self.hidden_norm(x)
        return x + self.down(nn.functional.silu(self.gate(inner)) * self.up(inner))


class Llama(nn.Module):
    """A decoder whose embedding is its output layer too.

    Parameters
    ----------
    vocabulary : int
    width, layers, heads, hidden, length : int
        By default those of the model of 15 million parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 288,
        layers: int = 6,
        heads: int = 6,
        hidden: int = 768,
        length: int = 256,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        for name, param in self.named_parameters():
            if param.dim() > 1:
                last = name.endswith(("mixed.weight", "down.weight"))
                nn.init.normal_(param, 0.0, 0.02 / math.sqrt(2 * layers) if last else 0.02)
        each = width // heads
        frequencies = 10000.0 ** (-torch.arange(0, each, 2) / each)
        angles = torch.arange(length)[:, None] * frequencies
        turns = torch.stack([angles.cos(), angles.sin()])
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of the next tokens, (n, length, vocabulary) from integers (n, length)."""
        x = self.tokens(tokens)
        turns = self.get_buffer("turns")[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turns)
        return nn.functional.linear(self.norm(x), self.tokens.weight)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Return pairs of numbers turned by angles that grow with the position."""
    cos, sin = turns
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)
