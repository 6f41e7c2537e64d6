"""Which training labels are wrong? In-Run values beside what else is computed from a run or from neighbours.

A tenth of the digits' training labels is replaced by another class; an MLP is trained on them with Adam, and every
method ranks the samples, lowest value first. The score is the AUROC of "label was replaced". Clean validation images
give the target; nobody sees which labels were replaced, and no method's settings were tuned on the outcome.

Sources: KNN-Shapley, Jia et al. (arXiv 1908.08619); influence function, Koh and Liang (arXiv 1703.04730), with the
Gauss-Newton matrix; TracIn-CP, Pruthi et al. (arXiv 2002.08484).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import results
from ..shapley import auroc
from ..tasks import digits, mlp
from ..tracker import track
from . import Finding, panels

CHECKPOINTS = 5


def run(
    seed: int = 0, seeds: int = 5, samples: int = 1000, epochs: int = 15, batch: int = 32, wrong: float = 0.1
) -> Finding:
    """The experiment over `seeds` seeds: other training samples, wrong labels, initial weights and order in each."""
    found: dict[str, list[float]] = {}
    accuracy = []
    for s in range(seed, seed + seeds):
        scores, flipped, right = one_seed(s, samples, epochs, batch, wrong)
        accuracy.append(right)
        for method, values in scores.items():
            found.setdefault(method, []).append(auroc(-values, flipped))
    order = sorted(found, key=lambda m: -np.mean(found[m]))
    rows = [[m, f"{np.mean(found[m]):.3f}", f"{np.std(found[m]):.3f}", *(f"{a:.3f}" for a in found[m])] for m in order]
    head = ["method", "AUROC", "sd", *(f"seed {s}" for s in range(seed, seed + seeds))]
    text = (
        f"mislabel: {wrong:.0%} of {samples} digit labels wrong; AUROC of finding them "
        f"(validation accuracy {np.mean(accuracy):.3f})\n{results.table(head, rows)}"
    )
    return Finding(text, {"auroc": {m: found[m] for m in order}, "accuracy": accuracy}, _draw(found, order))


def one_seed(
    seed: int, samples: int, epochs: int, batch: int, wrong: float
) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Every method's values [samples], which labels are wrong [samples], and the model's validation accuracy."""
    rng = np.random.default_rng(seed)
    pixels, classes = digits()
    order = rng.permutation(len(classes))
    chosen, held_out = order[:samples], order[samples : samples + 200]
    labels = classes[chosen].copy()
    flipped = np.zeros(samples, bool)
    flipped[rng.choice(samples, round(wrong * samples), replace=False)] = True
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    x, y = torch.from_numpy(pixels[chosen]).float(), torch.from_numpy(labels)
    validation = torch.from_numpy(pixels[held_out]).float(), torch.from_numpy(classes[held_out])

    values: dict[str, np.ndarray] = {}
    checkpoints: list[nn.Module] = []
    for method in ("first", "path_secant"):
        values[f"In-Run {method}"], checkpoints = _trained(x, y, validation, method, epochs, batch, seed)
    model = checkpoints[-1]
    per_checkpoint = [gradients_of(m, x, y) for m in checkpoints]
    toward = [gradients_of(m, *validation).mean(0) for m in checkpoints]
    values["KNN-Shapley (pixels)"] = knn_shapley(pixels[chosen], labels, pixels[held_out], classes[held_out])
    values["influence function"] = influence(model, x, per_checkpoint[-1], toward[-1])
    values["TracIn-CP"] = torch.stack([g @ v for g, v in zip(per_checkpoint, toward, strict=True)]).sum(0).numpy()
    values["loss, at the end"] = -_losses(model, x, y).numpy()
    values["loss, checkpoints"] = -torch.stack([_losses(m, x, y) for m in checkpoints]).sum(0).numpy()
    values["gradient norm, at the end"] = -per_checkpoint[-1].norm(dim=1).numpy()
    values["gradient norm, checkpoints"] = -torch.stack([g.norm(dim=1) for g in per_checkpoint]).sum(0).numpy()
    right = (model(validation[0]).argmax(1) == validation[1]).double().mean()
    return values, flipped, float(right)


def _trained(
    x: Tensor, y: Tensor, validation: tuple[Tensor, Tensor], method: str, epochs: int, batch: int, seed: int
) -> tuple[np.ndarray, list[nn.Module]]:
    """The run's total value of each sample, and plain copies of the model at `CHECKPOINTS` times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    target = lambda: F.cross_entropy(model(validation[0]), validation[1])  # noqa: E731
    tracker = track(model, optimizer, method, validation=target)
    total = np.zeros(len(x))
    copies: list[nn.Module] = []
    marks = {round(epochs * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    rng = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        for ids in np.array_split(rng.permutation(len(x)), max(len(x) // batch, 1)):
            with tracker.step(ids) as step:
                F.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
            total[ids] += step.values.numpy()
        if epoch in marks:
            copies.append(copy.deepcopy(model))  # which has no tracker
    tracker.close()
    return total, copies


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model(x), y, reduction="none")


def gradients_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each sample's gradient, [N, P]."""
    params = {n: p.detach() for n, p in model.named_parameters()}

    def one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, x, y)
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def influence(model: nn.Module, x: Tensor, gradients: Tensor, toward: Tensor, damping: float = 0.01) -> np.ndarray:
    """<g_v, (G + damping)^-1 g_z>, G the Gauss-Newton matrix of the mean training loss."""
    params = {n: p.detach() for n, p in model.named_parameters()}

    def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x[None],))[0]

    matrix = damping * torch.eye(gradients.shape[1])
    for part in x.split(100):
        jacobian = torch.func.vmap(torch.func.jacrev(logits), (None, 0))(params, part)
        rows = torch.cat([j.flatten(2) for j in jacobian.values()], 2)  # [N, C, P]
        p = model(part).detach().softmax(1)
        # The softmax's Hessian diag(p) - p p^T is R R^T with R = diag(sqrt p) - p sqrt(p)^T.
        rows = p.sqrt()[:, :, None] * (rows - (p[:, None, :] @ rows))
        flat = rows.flatten(0, 1)
        matrix.addmm_(flat.T, flat, alpha=1 / len(x))
    return (gradients @ torch.cholesky_solve(toward[:, None], torch.linalg.cholesky(matrix))[:, 0]).numpy()


def knn_shapley(
    x: np.ndarray, y: np.ndarray, validation_x: np.ndarray, validation_y: np.ndarray, k: int = 5
) -> np.ndarray:
    """The exact Shapley value of each training sample for a k-nearest-neighbour classifier's validation accuracy.

    Args:
        x: [N, D]; y: [N]; validation_x: [V, D]; validation_y: [V]; k: neighbours that vote, each with 1/k.

    Returns:
        float64 [N]. Source: arXiv 1908.08619, theorem 1.
    """
    values = np.zeros(len(x))
    n = len(x)
    for point, label in zip(validation_x, validation_y, strict=True):
        near = np.argsort(((x - point) ** 2).sum(1), kind="stable")
        match = (y[near] == label).astype(float)
        i = np.arange(1, n)
        steps = (match[:-1] - match[1:]) / k * np.minimum(k, i) / i
        own = np.empty(n)
        own[-1] = match[-1] / n * min(k, n) / k
        own[:-1] = own[-1] + np.cumsum(steps[::-1])[::-1]
        values[near] += own
    return values / len(validation_x)


def _draw(found: dict[str, list[float]], order: Sequence[str]) -> Any:
    figure, (axes,) = panels(7.5, 0.6 + 0.42 * len(order))
    for i, method in enumerate(order):
        colour = "#d1495b" if method.startswith("In-Run") else "#30638e"
        axes.barh(i, np.mean(found[method]), color=colour, alpha=0.5)
        axes.scatter(found[method], [i] * len(found[method]), color=colour, s=12)
        axes.text(0.985, i, f"{np.mean(found[method]):.3f}", va="center", ha="right", fontsize=8)
    axes.axvline(0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.invert_yaxis()
    axes.set(xlim=(0.4, 1), xlabel="AUROC of finding wrong labels (dots: seeds; 0.5 is chance)")
    return figure
