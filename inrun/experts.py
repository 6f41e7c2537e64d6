"""Hugging Face's fused experts: `[E, O, I]` weights, which tokens meet in rows sorted by expert.

    y[n] = x[n] @ W[e(n)]^T        dot_n = <dL/dy[n], x[n] @ D[e(n)]^T>

Each row has the probe of its token's sample, so that autograd adds the rows' dots up. That is one grouped product more
than the three of a training step. See `functional.py` for probes and directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inrun_kernels.grouped import by_groups, grouped_mm, grouped_wgrad

from . import functional
from .forward_mode import split_samples
from .layers import ForwardModeRule
from .tap import along


class ExpertsRule(ForwardModeRule):
    """By grouped products where the step is scored inline; else by forward-mode AD."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self._inrun.keep is not None or self._inrun.probe is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        many = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.num_experts, device=experts.device)
        offsets = torch.searchsorted(experts, numbers, right=True).int()
        tokens = order // many
        x, probe = hidden_states[tokens], self._probe_of(tokens, hidden_states)
        x = self._grouped(x, _first(self), probe, offsets)
        x = self._grouped(self._apply_gate(x) if self.has_gate else self.act_fn(x), "down_proj", probe, offsets)
        x = x * top_k_weights.reshape(-1)[order, None]
        return x[order.argsort()].unflatten(0, (-1, many)).sum(1).to(hidden_states.dtype)

    def _probe_of(self: Any, tokens: Tensor, hidden_states: Tensor) -> Tensor:
        """The probe of each of these tokens' samples, or documents."""
        tap = self._inrun
        if tap.layout is None:
            samples = split_samples(tap, hidden_states, tap.probe.shape[0])
            return tap.probe[tokens // samples.shape[1]]
        tap.layout.require(tap, split_samples(tap, hidden_states, tap.layout.rows))
        return tap.probe[torch.searchsorted(tap.layout.segments, tokens, right=True) - 1]

    def _grouped(self: Any, x: Tensor, name: str, probe: Tensor, offsets: Tensor) -> Tensor:
        weight, direction = self._parameters[name], along(self, name)
        if self.config._experts_implementation == "eager":  # the one that autocast reaches
            x, weight, _ = functional._autocast(x, weight, None)
        return functional._apply(_Grouped, x.to(weight.dtype), weight, direction, probe, offsets)


def is_experts(module: Any) -> bool:
    """Whether a module computes what `transformers.integrations.moe` does, without biases, transposes and norms."""
    needed = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "config")
    if not all(hasattr(module, name) for name in needed):
        return False
    plain = not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
    return plain and set(module._parameters) == {_first(module), "down_proj"}


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
        if direction is None:
            return y
        return y + functional._shifted(probe, lambda d: by_groups(x, d.to(x.dtype).mT, offsets), direction, 3, None)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return functional._written_out_backward(_Grouped.written_out, ctx.saved_tensors, ctx.needs_input_grad, grad)
        x, weight, direction, probe, offsets = ctx.saved_tensors
        need_x, need_weight, _, need_probe, _ = ctx.needs_input_grad
        dots = None
        if direction is not None and need_probe:
            wide = x.float() if x.dtype == torch.float16 else x  # float16 has no range for a direction
            slices = [direction] if probe.dim() == 1 else direction.unbind(0)
            columns = [
                (grouped_mm(wide, d.to(wide.dtype).mT, offsets) * grad).sum(1, dtype=probe.dtype) for d in slices
            ]
            dots = columns[0] if probe.dim() == 1 else torch.stack(columns, 1)
        grad_x = grouped_mm(grad, weight, offsets) if need_x else None
        grad_weight = grouped_wgrad(x, grad, offsets) if need_weight else None
        return grad_x, grad_weight, None, dots, None
