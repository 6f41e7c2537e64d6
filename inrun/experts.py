"""Hugging Face's fused experts: `[E, O, I]` weights, which tokens meet in rows sorted by expert.

    y[n] = x[n] @ W[e(n)]^T        dot_n = <dL/dy[n], x[n] @ D[e(n)]^T>

Each row has the probe of its token's sample, so that autograd adds the rows' dots up; a deferred step keeps each
product's rows. That is one grouped product more than the three of a training step. See `functional.py` for probes and
directions.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from inrun_kernels.grouped import by_groups, grouped_mm, grouped_wgrad

from . import probing
from .forward_mode import split_samples
from .layers import InPartsRule, Part
from .tap import Layout, along


class ExpertsRule(InPartsRule):
    def in_parts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        many = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.num_experts, device=experts.device)
        offsets = torch.searchsorted(experts, numbers, right=True).int()
        tokens = order // many
        rows = hidden_states.new_empty(len(hidden_states), 0), tokens, offsets
        x = _Product(self, _first(self), *rows).scored(hidden_states[tokens])
        x = _Product(self, "down_proj", *rows).scored(self._apply_gate(x) if self.has_gate else self.act_fn(x))
        x = x * top_k_weights.reshape(-1)[order, None]
        return x[order.argsort()].unflatten(0, (-1, many)).sum(1).to(hidden_states.dtype)


class _Product(Part):
    """One grouped product of a module of experts, scored and kept as a layer is.

    Args:
        module: the experts; name: of the weight.
        like: `[B * T, 0]`, as many rows as there are tokens.
        tokens: of each row of the product, its token; offsets: int32, where each expert's rows end.
    """

    def __init__(self, module: Any, name: str, like: Tensor, tokens: Tensor, offsets: Tensor) -> None:
        super().__init__(module._inrun, module)
        self.weight, self.name = module._parameters[name], name
        self.like, self.tokens, self.offsets = like, tokens, offsets

    @property
    def direction(self) -> Tensor | None:
        return along(self.module, self.name)

    def scored(self, x):
        tap, like = self._inrun, self.weight[:0]
        if self.module.config._experts_implementation in ("eager", "batched_mm"):  # those that autocast reaches
            _, like = probing.autocast(x, like)
        x = x.to(like.dtype)
        if self.direction is None:
            return self.plain(x)
        if tap.keep is not None:
            return tap.keep(self, self.plain, x)
        probe = tap.shared_probe()
        return self.probed(self.placed(x, tap.layout or Layout(probe.shape[0])), probe, None)

    def plain(self, x):
        return probing.apply(_Grouped, x, self.weight.to(x.dtype), None, None, self.offsets)

    def placed(self, x, layout):
        """Find out whose each row is: a sample's, or a document's."""
        layout, tap = layout.on(x.device), self._inrun
        samples = split_samples(tap, self.like, layout.rows)
        self.count = layout.count
        if layout.segments is None:
            self.owners = self.tokens // samples.shape[1]
        else:
            layout.require(tap, samples)
            self.owners = torch.searchsorted(layout.segments, self.tokens, right=True) - 1
        return x

    def probed(self, x, probe, segments):
        return probing.apply(_Grouped, x, self.weight.to(x.dtype), self.direction, probe[self.owners], self.offsets)

    def dots(self, x, grad, segments):
        assert self.direction is not None
        rows = _row_dots(x, grad, self.direction, self.offsets)
        return rows.new_zeros(self.count, *rows.shape[1:]).index_put_((self.owners,), rows, accumulate=True)


def is_experts(module: Any) -> bool:
    """Whether a module computes what `transformers.integrations.moe` does, without biases, transposes and norms."""
    needed = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "config")
    if not all(hasattr(module, name) for name in needed):
        return False
    plain = not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
    return plain and _is_dispatched(module) and set(module._parameters) == {_first(module), "down_proj"}


def _is_dispatched(module: Any) -> bool:
    """Whether the forward is the one that `use_experts_implementation` gives a class, and not one around it."""
    moe: Any = sys.modules.get("transformers.integrations.moe")
    if moe is None:
        return False
    any_other = moe.use_experts_implementation(type("Experts", (nn.Module,), {}))
    return getattr(type(module).forward, "__code__", None) is any_other.forward.__code__


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, direction, probe, offsets):
        ctx.save_for_backward(x, weight, direction, probe, offsets)
        return grouped_mm(x, weight.mT, offsets)

    @staticmethod
    def written_out(x, weight, direction, probe, offsets):
        y = by_groups(x, weight.mT, offsets)
        return probing.shifted(y, probe, lambda d: by_groups(x, d.to(x.dtype).mT, offsets), direction, 3, None)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return probing.written_out_backward(_Grouped.written_out, ctx.saved_tensors, ctx.needs_input_grad, grad)
        x, weight, direction, _, offsets = ctx.saved_tensors
        need_x, need_weight, _, need_probe, _ = ctx.needs_input_grad
        dots = None
        if direction is not None and need_probe:
            dots = _row_dots(x, grad, direction, offsets)
        grad_x = grouped_mm(grad, weight, offsets) if need_x else None
        grad_weight = grouped_wgrad(x, grad, offsets) if need_weight else None
        return grad_x, grad_weight, None, dots, None


def _row_dots(x: Tensor, grad: Tensor, direction: Tensor, offsets: Tensor) -> Tensor:
    """`[N]`, or `[N, M]` for M directions: each row's dots."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    x = x.float() if x.dtype == torch.float16 else x  # float16 has no range for a direction
    slices = [direction] if direction.dim() == 3 else direction.unbind(0)
    columns = [(grouped_mm(x, d.to(x.dtype).mT, offsets) * grad).sum(1, dtype=dtype) for d in slices]
    return columns[0] if direction.dim() == 3 else torch.stack(columns, 1)
