"""The peers: every known way to have the samples' gradient dots beside the training gradient.

Each is written here from its formula, at its best in plain PyTorch, but for two published ones, which run as they are.
Throughout, `acts [B,T,I]` is a layer's input, `grads [B,T,O]` the gradient of its output, `val_grad [O,I]` (or
`directions`, one tensor per parameter) the direction.

    plain               the weight gradient alone, no dots: what every ratio is relative to
    inrun               ours
    inrun_validated     whole steps of ours, each with one sequence's validation pass; others are given its gradient
    two_gemms           rowsum(acts * (grads @ val_grad)), a second GEMM as large as the weight gradient's, with its
                        [B,T,min(I,O)] product stored in the compute dtype (arXiv 2406.11011, section 4.2); hooks
                        take the layers' inputs and output gradients (GhostSuite, ghost clipping)
    two_gemms_compiled  the same products under torch.compile
    stored              per-sample gradients [B,O,I] by hooks, kept to the end of the backward (Opacus; "in-run with
                        per-sample gradients" in the paper's table 1)
    vmap                per-sample gradients by torch.func: vmap(grad(loss))
    opacus              per-sample gradients by Opacus (its `GradSampleModule`, from PyPI); where it is installed
    ghostsuite          the paper's authors' own code (its `GradDotProdEngine`), with a validation sequence at the end
                        of the batch, to be set beside inrun_validated; where its folder is on PYTHONPATH
                        (git clone https://github.com/Jiachen-T-Wang/GhostSuite)
    loop                squares of gradients: one sample's gradient at a time
    two_steps           norms, biases and embeddings: the parameter's gradient, then the dots, as torch operations
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import inrun
from inrun_kernels import (
    bias_wgrad_dot,
    embedding_dot,
    ghost_dot,
    ghost_dot_pairwise,
    ghost_square,
    ghost_wgrad_dot,
    norm_wgrad_dot,
)
from inrun_kernels.norms import norm_backward

# ---------------------------------------------------------------- one layer: tensors in, tensors out


def plain(acts: Tensor, grads: Tensor, val_grad: Tensor) -> tuple[Tensor, None]:
    return grads.flatten(0, 1).T @ acts.flatten(0, 1), None


def two_gemms(acts: Tensor, grads: Tensor, val_grad: Tensor) -> tuple[Tensor, Tensor]:
    return plain(acts, grads, val_grad)[0], gemm_rowsum(acts, grads, val_grad)


def gemm_rowsum(acts: Tensor, grads: Tensor, val_grad: Tensor) -> Tensor:
    """`[B]` dots by the association that stores the narrower product."""
    if acts.shape[-1] <= grads.shape[-1]:
        return ((grads @ val_grad) * acts).sum((1, 2))
    return ((acts @ val_grad.T) * grads).sum((1, 2))


def stored(acts: Tensor, grads: Tensor, val_grad: Tensor) -> tuple[Tensor, Tensor]:
    per_sample = grads.mT @ acts
    return per_sample.sum(0), per_sample.flatten(1) @ val_grad.flatten()


def vmap_grad(acts: Tensor, grads: Tensor, val_grad: Tensor) -> tuple[Tensor, Tensor]:
    def loss(weight: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return (F.linear(a, weight) * g).sum()

    per_sample = vmap(grad(loss), (None, 0, 0))(val_grad, acts, grads)  # a linear layer: any weight will do
    return per_sample.sum(0), per_sample.flatten(1) @ val_grad.flatten()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` at the first call; after `torch.compiler.reset()` again, for the next shape."""
    compile_once = cache(lambda: torch.compile(function, dynamic=False))
    return lambda *args: compile_once()(*args)


# (acts, grads, val_grad, val_acts, val_grads) -> (weight gradient or None, dots or None); val_grad is the product of
# the last two, one validation sample's.
Kernel = Callable[..., tuple[Tensor | None, Tensor | None]]

two_gemms_compiled, gemm_rowsum_compiled = compiled(two_gemms), compiled(gemm_rowsum)

# Weight gradient and dots together, as the backward of a linear layer needs them.
WGRAD_DOT: dict[str, Kernel] = {
    "plain": lambda a, g, d, *_: plain(a, g, d),
    "inrun": lambda a, g, d, *_: ghost_wgrad_dot(a, g, d, grad_dtype=a.dtype),
    "two_gemms": lambda a, g, d, *_: two_gemms(a, g, d),
    "two_gemms_compiled": lambda a, g, d, *_: two_gemms_compiled(a, g, d),
    "stored": lambda a, g, d, *_: stored(a, g, d),
    "vmap": lambda a, g, d, *_: vmap_grad(a, g, d),
}

if torch.cuda.is_available():  # the kernels' forms, of which "inrun" takes one; C has but one
    for _form in ("two", "prefix"):
        WGRAD_DOT[f"inrun_{_form}"] = lambda a, g, d, *_, form=_form: ghost_wgrad_dot(
            a, g, d, form=form, grad_dtype=a.dtype
        )

_KERNEL = "triton" if torch.cuda.is_available() else None  # on a GPU the kernel, also where gradients would be formed

# Dots alone, for a direction known only after the backward; `plain` is a GEMM of as many FLOPs.
DOT: dict[str, Kernel] = {
    "plain": lambda a, g, d, *_: plain(a, g, d),
    "inrun": lambda a, g, d, *_: (None, ghost_dot(a, g, d)),
    "inrun_pairwise": lambda a, g, d, va, vg: (None, ghost_dot_pairwise(a, g, va, vg, backend=_KERNEL).sum(1)),
    "gemm_rowsum": lambda a, g, d, *_: (None, gemm_rowsum(a, g, d)),
    "gemm_rowsum_compiled": lambda a, g, d, *_: (None, gemm_rowsum_compiled(a, g, d)),
}


def stored_squares(acts: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    squares = (grads.mT @ acts).square()
    return squares.sum(0), squares.sum((1, 2))


def looped_squares(acts: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    total, norms = torch.zeros(grads.shape[2], acts.shape[2], device=acts.device, dtype=acts.dtype), []
    for a, g in zip(acts, grads, strict=True):
        product = g.T @ a
        total.addcmul_(product, product)
        norms.append(product.flatten().dot(product.flatten()))
    return total, torch.stack(norms)


stored_squares_compiled = compiled(stored_squares)

# Each sample's squared norm and the sum of their squared gradients; `plain` is the weight gradient, without either.
SQUARES: dict[str, Kernel] = {
    "plain": lambda a, g, d, *_: (plain(a, g, d)[0], None),
    "inrun": lambda a, g, *_: ghost_square(a, g),
    "stored": lambda a, g, *_: stored_squares(a, g),
    "stored_compiled": lambda a, g, *_: stored_squares_compiled(a, g),
    "loop": lambda a, g, *_: looped_squares(a, g),
}

# ---------------------------------------------------------------- norms, biases, embeddings: (x, grads, direction)


def norm_plain(normed: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, None]:
    return (normed * grads).sum((0, 1)), None


def norm_two_steps(normed: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    product = normed * grads
    return product.sum((0, 1)), (product * direction).sum((1, 2))


def layer_norm_plain(x: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, None]:
    """Forward and backward, with the direction for a weight."""
    stats, shape = torch.native_layer_norm(x, direction.shape, direction, None, 1e-5)[1:], direction.shape
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(grads, x, shape, *stats, direction, None, [True, True, False])[1], None


def layer_norm_inrun(x: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    _, mean, rstd = torch.native_layer_norm(x, direction.shape, direction, None, 1e-5)
    found = norm_backward(x, grads, direction, (mean, rstd), direction, None, None, False)
    assert found is not None
    return found[1], found[3]


def layer_norm_two_steps(x: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    along = F.layer_norm(x, direction.shape, direction)
    return layer_norm_plain(x, grads, direction)[0], (grads * along).sum((1, 2))


def bias_plain(_: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, None]:
    return grads.sum((0, 1)), None


def bias_two_steps(_: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    of_samples = grads.sum(1)
    return of_samples.sum(0), of_samples @ direction


def embedding_plain(ids: Tensor, grads: Tensor, table: Tensor) -> tuple[Tensor, None]:
    return torch.ops.aten.embedding_dense_backward(grads, ids, len(table), -1, False), None


def embedding_two_steps(ids: Tensor, grads: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    return embedding_plain(ids, grads, table)[0], (F.embedding(ids, table) * grads).sum((1, 2))


ROWS: dict[str, dict[str, Kernel]] = {
    "norm": {
        "plain": norm_plain,
        "inrun": norm_wgrad_dot,
        "two_steps": norm_two_steps,
        "two_steps_compiled": compiled(norm_two_steps),
    },
    "layer norm": {
        "plain": layer_norm_plain,
        "inrun": layer_norm_inrun,
        "two_steps": layer_norm_two_steps,
        "two_steps_compiled": compiled(layer_norm_two_steps),
    },
    "bias": {
        "plain": bias_plain,
        "inrun": lambda _, g, d: bias_wgrad_dot(g, d),
        "two_steps": bias_two_steps,
        "two_steps_compiled": compiled(bias_two_steps),
    },
    "embedding": {
        "plain": embedding_plain,
        "inrun": lambda ids, g, d: (embedding_plain(ids, g, d)[0], embedding_dot(ids, g, d)),
        "two_steps": embedding_two_steps,
        "two_steps_compiled": compiled(embedding_two_steps),
    },
}

# ---------------------------------------------------------------- a whole training step

LR = 1e-4


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Mean next-token loss of `x [B,T]`, `y [B,T]`; bf16 autocast on a GPU."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        logits = model(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def held_by(model: nn.Module) -> list[Tensor]:
    """A model's parameters, and where it is tracked their directions."""
    own = ({**module._parameters, **getattr(module, "_siblings", {})} for module in model.modules())
    return [p for held in own for p in held.values() if p is not None]


class Training:
    """Plain training: forward, backward, fused AdamW. Calling it makes one step; peers also return the dots `[B]`."""

    def __init__(self, model: nn.Module, directions: dict[str, Tensor]) -> None:
        self.model = model
        self.directions: dict[str, Tensor] = {}  # what the method keeps of them beside the model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def prepare(self) -> None:
        """What a step needs and its time does not count."""

    def resident(self) -> list[Tensor]:
        """What is held between steps, gradients left out."""
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*held_by(self.model), *states, *self.directions.values()]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        self.optimizer.zero_grad()
        loss_of(self.model, x, y).backward()
        self.optimizer.step()
        return None


class InRun(Training):
    """Ours, given the validation gradient. Making the step's directions of it is in the time."""

    def __init__(self, model: nn.Module, val_grads: dict[str, Tensor]) -> None:
        super().__init__(model, val_grads)
        self.val_grads = val_grads
        self.tracker = inrun.track(model, self.optimizer)

    def prepare(self) -> None:
        with self.tracker.validation():  # as a validation pass would leave the gradients
            for name, grad in self.val_grads.items():
                self.model.get_parameter(name).grad = grad.clone()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        with self.tracker.step(range(len(x))) as step:
            super().__call__(x, y)
        return step.values

    def written_directions(self) -> dict[str, Tensor]:
        """The directions of the last step."""
        return {slot.name: slot.direction.detach().clone() for slot in self.tracker.slots}


class InRunValidated(InRun):
    """Ours with its validation pass, of one sequence `[1,T]` for every step, in the time."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, {})
        self.validation = x, y

    def prepare(self) -> None:
        """Nothing."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        with self.tracker.validation():
            loss_of(self.model, *self.validation).backward()
        return super().__call__(x, y)


class Hooked(Training):
    """Forward hooks that take each layer's input, and tensor hooks that take the gradient of its output."""

    def __init__(self, model: nn.Module, directions: dict[str, Tensor]) -> None:
        super().__init__(model, directions)
        self.directions = directions
        self.found: list = []
        by_param = {id(p): directions[n] for n, p in model.named_parameters()}
        for module in model.modules():
            owned = {n: by_param[id(p)] for n, p in module.named_parameters(recurse=False)}
            if owned:
                module.register_forward_hook(partial(self._watch, owned))

    def _watch(self, owned: dict[str, Tensor], module: nn.Module, args: tuple, out: Tensor) -> None:
        out.register_hook(partial(self._layer, owned, module, [args[0].detach()]))

    def _layer(self, owned: dict[str, Tensor], module: nn.Module, inputs: list[Tensor], grads: Tensor) -> None:
        x = inputs.pop()  # the graph keeps this hook to the end of the backward; the input can go now
        x = x.to(grads.dtype) if x.is_floating_point() else x
        self.found += [self.take(module, name, x, grads, d.to(grads.dtype)) for name, d in owned.items()]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        super().__call__(x, y)
        dots = self.dots()
        self.found.clear()
        return dots

    def take(self, module: nn.Module, name: str, x: Tensor, grads: Tensor, direction: Tensor) -> object:
        raise NotImplementedError

    def dots(self) -> Tensor:
        raise NotImplementedError


class TwoGemms(Hooked):
    rowsum = staticmethod(gemm_rowsum)

    def take(self, module, name, x, grads, direction):
        if isinstance(module, nn.Linear) and name == "weight":
            return self.rowsum(x, grads, direction)
        if isinstance(module, nn.Embedding):
            return (F.embedding(x, direction) * grads).sum((1, 2))
        return sample_gradients(module, name, x, grads) @ direction

    def dots(self):
        return torch.stack([d.float() for d in self.found]).sum(0)


class TwoGemmsCompiled(TwoGemms):
    rowsum = staticmethod(gemm_rowsum_compiled)


class Stored(Hooked):
    def take(self, module, name, x, grads, direction):
        return sample_gradients(module, name, x, grads), direction

    def dots(self):
        return torch.stack([(g.flatten(1) @ d.flatten()).float() for g, d in self.found]).sum(0)


class Vmap(Training):
    def __init__(self, model: nn.Module, directions: dict[str, Tensor]) -> None:
        super().__init__(model, directions)
        self.directions = directions

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        def share(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss_of(lambda x: functional_call(self.model, params, (x,)), x[None], y[None]) / batch

        batch = len(x)
        params = {n: p.detach() for n, p in self.model.named_parameters()}
        per_sample = vmap(grad(share), (None, 0, 0))(params, x, y)
        dots = torch.stack([g.flatten(1) @ self.directions[n].flatten() for n, g in per_sample.items()]).sum(0)
        for name, p in self.model.named_parameters():
            p.grad = per_sample[name].sum(0)
        del per_sample
        self.optimizer.step()
        return dots


class Opacus(Training):
    def __init__(self, model: nn.Module, directions: dict[str, Tensor]) -> None:
        super().__init__(model, directions)
        self.directions = directions
        self.called: Any = importlib.import_module("opacus").GradSampleModule(model, loss_reduction="mean")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        self.optimizer.zero_grad()
        loss_of(self.called, x, y).backward()
        params: dict[str, Any] = dict(self.model.named_parameters())  # with what Opacus keeps on them
        dots = torch.stack([p.grad_sample.flatten(1) @ self.directions[n].flatten() for n, p in params.items()]).sum(0)
        for p in params.values():
            p.grad_sample = None
        self.optimizer.step()
        return dots / len(x)


class GhostSuite(Training):
    """Without autograd's own weight gradients, which it does not need: its "dummy bias" option."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, {})
        self.validation = x, y
        self.engine = importlib.import_module("ghostEngines").GradDotProdEngine(model, len(x), use_dummy_bias=True)
        add_dummy_bias = importlib.import_module("ghostEngines.transformers_support")._add_dummy_bias
        for module in [m for m in model.modules() if isinstance(m, nn.Embedding)]:  # as it does to Hugging Face's GPT-2
            add_dummy_bias(module)
        self.engine.attach(self.optimizer)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor | None:
        val_x, val_y = self.validation
        self.engine.attach_train_batch(x, y, iter_num=0)
        self.optimizer.zero_grad()
        loss_of(self.model, torch.cat([x, val_x]), torch.cat([y, val_y])).backward()
        self.engine.prepare_gradients()
        self.optimizer.step()
        self.engine.aggregate_and_log()
        self.engine.clear_gradients()
        dots = self.engine.dot_product_log.pop()["dot_product"].to(x.device)
        batch, val_batch = len(x), len(val_x)
        return dots * (batch + val_batch) ** 2 / (batch * val_batch)  # of the losses' means in place of one over all


def sample_gradients(module: nn.Module, name: str, x: Tensor, grads: Tensor) -> Tensor:
    """`[B, *shape]`, every sample's gradient of one parameter."""
    if isinstance(module, nn.Embedding):
        index = x[..., None].expand(grads.shape)
        return grads.new_zeros(len(x), *module.weight.shape).scatter_add_(1, index, grads)
    if name == "bias":
        return grads.sum(1)
    if isinstance(module, nn.LayerNorm):
        return (F.layer_norm(x, module.normalized_shape, eps=module.eps) * grads).sum(1)
    assert isinstance(module, nn.Linear)
    return grads.mT @ x


STEPS: dict[str, type[Training]] = {
    "plain": Training,
    "inrun": InRun,
    "two_gemms": TwoGemms,
    "two_gemms_compiled": TwoGemmsCompiled,
    "stored": Stored,
    "vmap": Vmap,
}
if find_spec("opacus"):
    STEPS["opacus"] = Opacus
