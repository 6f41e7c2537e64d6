"""`torch.nn.MultiheadAttention`, whose projections score their samples as linear layers do.

Torch's module passes its weights to one function, past any layer. With a probe, or in a deferred step, the projections
are linear layers instead, and the attention between them is torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InRunError
from .layers import InPartsRule, LinearRule, Part
from .tap import Tap

_ALL = "in_proj_weight"  # holds the projections of queries, keys and values, unless their widths differ


class AttentionRule(InPartsRule):
    """Torch's own forward without a probe; with one, or in a deferred step, its projections as layers."""

    def in_parts(self: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise InRunError(f"{self._inrun}: expected a query with a batch axis, got {tuple(query.shape)}")
        return _attend(self, query, *args, **kwargs)


class _Projection(Part, LinearRule):
    """One of its projections, scored and kept as a linear layer is.

    Args:
        tap: of the attention; module: that or its last layer, whichever holds the projection.
        names: of its weight and its bias.
        third: which third of those that are three in one.
    """

    may_fold = False

    def __init__(self, tap: Tap, module: Any, names: tuple[str, str], third: int | None = None) -> None:
        super().__init__(tap, module)
        self._parameters = module._parameters
        self._siblings = vars(module).get("_siblings", {})  # of a projection that is frozen, there are none
        self.param_names, self.third = names, third

    def scored(self, x):
        return self.plain(x) if all(d is None for d in self.directions()) else super().scored(x)

    def plain(self, x):
        return F.linear(*self.operands(x))

    def gradient_factors(self, x, grad):
        return super().gradient_factors(x, grad) if self.third is None else None

    def operands(self, x):
        return x, *self._cut(self._parameters[name] for name in self.param_names)

    def directions(self, dtype=None):
        return self._cut(super().directions())

    def _cut(self, pair: Iterable[Any]) -> tuple[Any, Any]:
        weight, bias = pair
        if self.third is not None:
            weight = weight.chunk(3, -2)[self.third] if weight is not None and self.param_names[0] == _ALL else weight
            bias = None if bias is None else bias.chunk(3, -1)[self.third]
        return weight, bias


def is_attention(module: Any) -> bool:
    """Whether a module is torch's, with nothing but projections to score."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return module.bias_k is None and not module.add_zero_attn


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
    out = _Projection(module._inrun, module.out_proj, ("weight", "bias")).scored(out.transpose(1, 2).flatten(2))
    out = out.transpose(0, 1).contiguous()  # as torch's lies in memory: a dropout draws its numbers in that order
    return out.transpose(0, 1) if module.batch_first else out, weights


def _projected(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values, `[B, T, E]`."""
    inputs = [x if module.batch_first else x.transpose(0, 1) for x in (query, key, value)]
    names = (_ALL,) * 3
    if not module._qkv_same_embed_dim:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if missing := {name for name in names if name not in module._parameters}:  # PEFT merges its adapter into them
        raise InRunError(
            f"{module._inrun}: expected its {', '.join(sorted(missing))} among its parameters while it "
            "runs, as in nn.MultiheadAttention, got none; score it by the module around it, track(..., "
            "through={parameter: module})"
        )
    if module._qkv_same_embed_dim and query is key and key is value:
        return _Projection(module._inrun, module, (_ALL, "in_proj_bias")).scored(inputs[0]).chunk(3, -1)
    thirds = [_Projection(module._inrun, module, (name, "in_proj_bias"), i) for i, name in enumerate(names)]
    return [third.scored(x) for third, x in zip(thirds, inputs, strict=True)]


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
