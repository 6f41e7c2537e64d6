"""A small GPT for `inrun train`: pre-norm blocks, causal attention, GELU MLP, learned positions.

Every parameter lives in an `nn.Linear`, `nn.Embedding`, `nn.LayerNorm` or `nn.RMSNorm`, and position ids are
expanded to [B, T], so that each parameter's gradient can be split among the samples of a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun.config import GPTConfig


def _make_norm(config: GPTConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.width, eps=1e-6)
    return nn.LayerNorm(config.width, bias=config.bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # [B, H, T, D]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = _make_norm(config), _make_norm(config)
        self.attention = Attention(config)
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm_attention(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm_mlp(x)))))


class GPT(nn.Module):
    """Decoder-only language model.

    Example:
        logits = GPT(GPTConfig())(torch.zeros(2, 16, dtype=torch.long))      # [2, 16, 256]
    """

    def __init__(self, config: GPTConfig, vocab_size: int = 256) -> None:
        super().__init__()
        config.require_valid()
        self.config = config
        self.tokens = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(config.block_size, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _make_norm(config)
        self.head = nn.Linear(config.width, vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what writes into the residual stream is scaled by its depth, as in GPT-2
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Next-token logits.

        Args:
            x: int64 [B, T] token ids, T at most `block_size`.

        Returns:
            [B, T, V] logits.

        Raises:
            ValueError: if T exceeds `block_size`.
        """
        B, T = x.shape
        if self.config.block_size < T:
            raise ValueError(f"x: expected at most block_size={self.config.block_size} tokens, got {T}")
        positions = torch.arange(T, device=x.device).expand(B, T)
        h = self.drop(self.tokens(x) + self.positions(positions))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
