# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The kernels, from the formula to the roofline
#
# What one sample did to the validation loss in one step is a dot product of two things of the size of the model:
#
# $$\text{value}_z = \langle D, g_z \rangle$$
#
# $g_z$ is the gradient of this sample's share of the loss, and $D$ the *direction*, for SGD `lr` times the
# validation gradient. The trouble: training never computes $g_z$. It computes the *sum* over the batch.
# This notebook gets all the $\langle D, g_z \rangle$ of a linear layer in five ways, each better than the one before.

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch

from inrun import ghost_dot, ghost_dot_pairwise, ghost_wgrad_dot

torch.manual_seed(0)
torch.set_num_threads(1)
B, T, I, O = 8, 256, 384, 1536  # noqa: E741  batch, tokens, inputs, outputs
acts, grads, D = torch.randn(B, T, I), torch.randn(B, T, O), torch.randn(O, I)

# %% [markdown]
# ## 1. The formula, slowly
#
# A linear layer sees `acts [T, I]` of one sample on the way forward and `grads [T, O]`, the loss's gradient at its
# output, on the way back. The sample's weight gradient is `grads^T acts`. In float64, one sample at a time, this is the
# truth that everything below is held to:

# %%
truth = torch.stack([(grads[b].double().T @ acts[b].double() * D.double()).sum() for b in range(B)])


def check(name, dots):
    error = float((dots.double() - truth).norm() / truth.norm())
    print(f"{name:16} relative error {error:.1e}")
    assert error < 1e-5


# %% [markdown]
# ## 2. Per-sample gradients, stored
#
# All at once is one `einsum`. It works, and holds `B` times the weight in memory: no way to train.


# %%
def stored(acts, grads, D):
    each = torch.einsum("bto,bti->boi", grads, acts)  # [B, O, I]: the thing never to store
    return (each * D).sum((1, 2))


check("stored", stored(acts, grads, D))
print(f"{4 * B * O * I / 2**20:.0f} MiB for one layer whose weight has {4 * O * I / 2**20:.2f} MiB")

# %% [markdown]
# ## 3. Two products: the ghost dot
#
# Turn the sum around. $\langle D, \sum_t \text{grads}_t \text{acts}_t^T \rangle = \sum_t \text{grads}_t \cdot (D\,
# \text{acts}_t)$: send the activations through $D$ as if it were the weight, and meet the gradients token by token. No
# per-sample gradient appears (hence *ghost*). This is the published form (arXiv 2406.11011); it costs a second product
# as large as the weight gradient's, and a `[B, T, O]` temporary.


# %%
def two_products(acts, grads, D):
    return ((acts @ D.T) * grads).sum((1, 2))


check("two products", two_products(acts, grads, D))

# %% [markdown]
# The temporary need not exist: work tile by tile, and let each tile of the product meet its tile of `grads` while it is
# still in registers. That is the kernel `ghost_dot`; in plain Python:


# %%
def tiled(acts, grads, D, tile=128):
    dots = torch.zeros(B)
    for o in range(0, O, tile):
        product = acts @ D[o : o + tile].T  # [B, T, tile], the only temporary
        dots += (product * grads[:, :, o : o + tile]).sum((1, 2))
    return dots


check("tiled", tiled(acts, grads, D))
check("ghost_dot", ghost_dot(acts, grads, D))

# %% [markdown]
# ## 4. Riding on the weight gradient
#
# Training computes `sum_b grads_b^T acts_b` anyway, as one long product over all `B * T` tokens. But tokens come sorted
# by sample! At each sample's last token the running tile *is* the gradient up to here. So: stop for a moment, contract
# what this sample brought with the same tile of $D$, go on. No second product: one multiply-add per weight
# and sample, `T` times less than the product itself. In plain Python:


# %%
def riding(acts, grads, D):
    total, scratch, dots = torch.zeros(O, I), torch.empty(O, I), torch.empty(B)
    for b in range(B):
        torch.mm(grads[b].T, acts[b], out=scratch)
        dots[b] = scratch.flatten() @ D.flatten()
        total += scratch
    return total, dots


weight_grad, dots = ghost_wgrad_dot(acts, grads, D)
check("riding", riding(acts, grads, D)[1])
check("ghost_wgrad_dot", dots)

# %% [markdown]
# A free test comes with it, *efficiency*: the dots must add up to what the whole gradient says. inrun checks this for
# every layer of your model at the first step.

# %%
print(f"sum of the dots {float(dots.sum()):.2f}, <weight gradient, D> {float((weight_grad * D).sum()):.2f}")

# %% [markdown]
# ## 5. Validation samples as they are
#
# $D$ itself is a sum of outer products of validation tokens. When they are few, skip it, and compare tokens with
# tokens: $\sum_{t,s} (a_t \cdot a_s)(b_t \cdot b_s)$, tiled like attention. It gives one score per *pair*.

# %%
val_acts, val_grads = torch.randn(2, 16, I), torch.randn(2, 16, O)
pairs = ghost_dot_pairwise(acts, grads, val_acts, val_grads)
whole = torch.einsum("vso,vsi->oi", val_grads, val_acts)
together = pairs.sum(1).double()
once = ghost_dot(acts, grads, whole).double()
print("pairs", list(pairs.shape), f" their sum beside ghost_dot: {float((together - once).norm() / once.norm()):.1e}")

# %% [markdown]
# ## What does it cost?
#
# Everything is compared with what training does anyway, the plain weight gradient. All take turns, so that a busy
# moment hits them alike; one thread's CPU time; the median of the ratios.


# %%
def plain(acts, grads, D):
    return grads.flatten(0, 1).T @ acts.flatten(0, 1)


def with_wgrad(dots_of):
    return lambda acts, grads, D: (plain(acts, grads, D), dots_of(acts, grads, D))


ways = {
    "plain": plain,
    "stored": with_wgrad(stored),
    "two products": with_wgrad(two_products),
    "ghost_dot": with_wgrad(ghost_dot),
    "ghost_wgrad_dot": ghost_wgrad_dot,
}


def times(ways, *tensors, rounds=7):
    """way -> seconds of each round, after one to warm up."""
    found = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.thread_time()
            way(*tensors)
            if turn:
                found[name].append(time.thread_time() - start)
    return found


def ratios(found):
    return {n: statistics.median(a / b for a, b in zip(t, found["plain"], strict=True)) for n, t in found.items()}


measured = times(ways, acts, grads, D)
for name, ratio in ratios(measured).items():
    print(f"{name:16} {1e3 * statistics.median(measured[name]):7.1f} ms   {ratio:.2f} of plain")

# %% [markdown]
# ## The roofline
#
# A kernel is bound by arithmetic or by memory. Its **arithmetic intensity** (FLOPs per byte that must move) says which:
# attainable speed is the lower of the machine's peak and intensity times bandwidth. We measure both ceilings here.

# %%
square, long, into = torch.randn(1024, 1024), torch.randn(2**24), torch.empty(2**24)
ceilings = times(
    {"product": lambda: square @ square, "copy": lambda: into.copy_(long)},
)
peak = 2 * 1024**3 / min(ceilings["product"]) / 1e9
bandwidth = 2 * 4 * 2**24 / min(ceilings["copy"]) / 1e9
print(f"ceilings: {peak:.0f} GFLOP/s, {bandwidth:.1f} GB/s")

product, weight, tokens = 2 * B * T * I * O, 4 * I * O, 4 * B * T * (I + O)  # FLOPs, bytes, bytes
needs = {  # FLOPs, and the bytes that must move at the least
    "plain": (product, tokens + weight),
    "stored": (2 * product + 2 * B * I * O, 2 * tokens + 2 * weight + 2 * B * weight),
    "two products": (2 * product, 2 * tokens + 2 * weight + 2 * 4 * B * T * O),
    "ghost_dot": (2 * product, 2 * tokens + 2 * weight),
    "ghost_wgrad_dot": (product + 2 * B * I * O, tokens + 2 * weight),
}
dot_alone = {"contracting alone": (2 * B * I * O, 2 * B * weight)}  # what "stored" does after its product

fig, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
x = torch.logspace(-1, 3, 200)
axes.loglog(x, torch.minimum(torch.tensor(peak), x * bandwidth), color="black", lw=1.5)
axes.axvline(peak / bandwidth, color="#bbbbbb", lw=0.8, ls=":")
axes.text(peak / bandwidth * 0.92, 0.6, "memory-bound", ha="right", fontsize=8, color="#777777")
axes.text(peak / bandwidth * 1.08, 0.6, "compute-bound", fontsize=8, color="#777777")
each = torch.randn(B, O, I)
measured |= times({"contracting alone": lambda: (each * D).sum((1, 2))})
colours = ("black", "#ee6677", "#ccbb44", "#66ccee", "#228833", "#aa3377")
for (name, (flops, nbytes)), colour in zip((needs | dot_alone).items(), colours, strict=True):
    speed = flops / statistics.median(measured[name]) / 1e9
    axes.scatter(flops / nbytes, speed, s=60, color=colour, label=f"{name}: {flops / nbytes:.3g} FLOP/byte", zorder=3)
axes.set(xlabel="arithmetic intensity (FLOP per byte)", ylabel="GFLOP/s", ylim=(0.5, 2 * peak))
axes.legend(frameon=False, fontsize=8, loc="lower right")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The products all sit under the flat roof: they are as fast as this machine multiplies, and the only way to be quicker
# is to *multiply less*. `ghost_wgrad_dot` does, with half the FLOPs of the others. Contracting stored gradients is
# down on the slope: it waits for memory. In `ghost_wgrad_dot` this very contraction meets each tile before it leaves.
#
# ## Where it loses
#
# The contraction costs `1/T` of the product in FLOPs, but on short samples that is no longer small, and the long
# product falls apart into little ones:

# %%
lengths = (8, 16, 32, 64, 128, 256, 512)
by_length = {"two products": [], "ghost_wgrad_dot": []}
for t in lengths:
    a, g = torch.randn(B, t, I), torch.randn(B, t, O)
    found = ratios(times({"plain": plain} | {n: ways[n] for n in by_length}, a, g, D, rounds=5))
    for name, line in by_length.items():
        line.append(found[name])

plt.figure(figsize=(7.2, 3.2), layout="constrained")
for name, colour in (("two products", "#ccbb44"), ("ghost_wgrad_dot", "#228833")):
    plt.semilogx(lengths, by_length[name], "o-", color=colour, label=name, base=2)
plt.axhline(1, color="black", lw=0.8)
plt.ylim(0)
plt.xlabel("tokens per sample T")
plt.ylabel("time, ratio to the plain weight gradient")
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# That is the library: `inrun.track` puts a layer in the place of each `nn.Linear` whose backward calls
# `ghost_wgrad_dot`, and hands the dots back as the gradient of a *probe*, so that autograd itself adds them up over
# layers and microbatches. The kernels are in `kernels/inrun_kernels`: `torch_path.py` is the CPU's riding loop,
# `wgrad_dot.py` the same in Triton, with the tile of the sample's gradient in registers.
