"""`torch.nn.MultiheadAttention`, whose projections score their samples as linear layers do.

Torch's module passes its weights to one function, past any layer. With a probe, the projections are
`functional.linear` instead, and the attention between them is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .layers import ForwardModeRule
from .tap import along


class AttentionRule(ForwardModeRule):
    """By its projections where each row is a sample and the step is scored inline; else by forward-mode AD."""

    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        tap = self._inrun
        by_projections = tap.keep is None and tap.probe is not None and tap.layout is None and query.dim() == 3
        if by_projections and self.bias_k is None and not self.add_zero_attn:
            return _attend(self, query, key, value, *args, **kwargs)
        return super().forward(query, key, value, *args, **kwargs)


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention.forward` returns, for the same arguments."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    mask = _mask(module, query, key_padding_mask, attn_mask)
    is_causal = is_causal and key_padding_mask is None and not need_weights
    heads = [x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in _projected(module, query, key, value)]
    q, k, v = heads  # [B, H, L or S, E / H]
    dropout, weights = module.dropout if module.training else 0.0, None
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, None if is_causal else mask, dropout, is_causal)
    last = module.out_proj
    directions = along(last, "weight"), along(last, "bias")
    out = functional.linear(out.transpose(1, 2).flatten(2), last.weight, last.bias, directions, module._inrun.probe)
    return out if module.batch_first else out.transpose(0, 1), weights


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values, `[B, T, E]`."""
    probe, bias, bias_direction = module._inrun.probe, module.in_proj_bias, along(module, "in_proj_bias")
    inputs = [x if module.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    if module._qkv_same_embed_dim:
        weight, direction = module.in_proj_weight, along(module, "in_proj_weight")
        if query is key and key is value:
            return functional.linear(inputs[0], weight, bias, (direction, bias_direction), probe).chunk(3, -1)
        weights, directions = _thirds(weight, -2), _thirds(direction, -2)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights, directions = ([f(module, name) for name in names] for f in (getattr, along))
    both = zip(directions, _thirds(bias_direction, -1), strict=True)
    layers = zip(inputs, weights, _thirds(bias, -1), both, strict=True)
    return [functional.linear(*layer, probe) for layer in layers]


def _thirds(x: Tensor | None, dim: int) -> Sequence[Any]:
    return [None] * 3 if x is None else x.chunk(3, dim)


def _mask(module: Any, query: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The two masks as one, added to the scores `[B, H, L, S]`."""
    kind = query.dtype
    padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", kind)
    mask = F._canonical_mask(mask, "attn_mask", None, "", kind, False)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, module.num_heads))
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding
