"""The products on plain torch and BLAS: what runs on a CPU where there is no kernel in C (`native`), and anywhere
`backend="torch"` is asked for.

Every function takes what the registered op takes (`val_grad` always with its leading M) and returns float32,
or float64 for float64 input. Half-precision input is widened sample by sample or chunk by chunk, so products
and sums are float32 throughout. Temporaries hold a few `_CHUNK` elements, apart from one weight (the scratch of
`ghost_wgrad_dot`, the widened direction of `ghost_dot`), one sample's widened activations and, of pairs, `_GRADIENTS`
elements of the samples' gradients or `_FEWEST` of their rows.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of a temporary: 4 MB in float32, about an L2 cache
_ROWS = 1 << 17  # elements of the buffer in which products of rows are formed: 512 KB, which stay in an L2 cache
_FEW_ROWS = 256  # that BLAS adds up: one after the other, so that of many the rounding grows
_DOT = 1 << 17  # elements whose products are formed and then added up: BLAS's own dot may lose three digits
_BLOCK = 1 << 21  # elements of the block of weight-gradient rows that ghost_wgrad_dot fills at a time
_GRADIENTS = 1 << 20, 1 << 25  # elements of samples' gradients together, on a CPU (where they stay in its cache), a GPU
_FEWEST = 16  # rows of them; of fewer, a product reads the activations for hardly anything


def ghost_dot(acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    """sum_o (acts @ val_grad^T) * grads, or the other association where it needs the narrower temporary."""
    batch, tokens, inputs = acts.shape
    outputs, wide = grads.shape[2], accumulate_dtype(acts)
    narrow_acts = inputs <= outputs
    step = max(1, _CHUNK // max(1, min(inputs, outputs)))
    flat_acts, flat_grads = acts.flatten(0, 1), grads.flatten(0, 1)
    if len(val_grad) == 1 and 0 < len(flat_acts) <= step and segments is None and not per_token:  # in the fewest calls
        a, g, direction = flat_acts.to(wide), flat_grads.to(wide), val_grad[0].to(wide)
        terms = (g @ direction).mul_(a) if narrow_acts else (a @ direction.T).mul_(g)
        return terms.view(batch, -1).sum(1, keepdim=True)
    columns = []
    for direction in val_grad:
        direction, sums = direction.to(wide), []
        for a, g in zip(*(x.split(step) for x in (flat_acts, flat_grads)), strict=True):
            a, g = a.to(wide), g.to(wide)
            sums.append(((g @ direction).mul_(a) if narrow_acts else (a @ direction.T).mul_(g)).sum(-1))
        columns.append(sums[0] if len(sums) == 1 else torch.cat(sums))
    return reduce_tokens(torch.stack(columns, 1), batch, tokens, segments, per_token)


def ghost_wgrad_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    form: str,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """A GEMM per sample, contracted with each direction while it is in cache; or one GEMM for all, and a `ghost_dot`.

    "two": into a scratch weight, then added to the total: three more passes over a weight, as much as the GEMM of
    some 30 tokens. "prefix": into the total, whose contraction grows by the sample's dot: one pass. "direct": one
    GEMM, and a second one for the dots.
    """
    wide = accumulate_dtype(acts)
    n_samples = acts.shape[0] if segments is None else segments.shape[0] - 1
    if form == "direct" or n_samples == 0:
        return weight_grad(acts, grads, grad_dtype or wide), ghost_dot(acts, grads, val_grad, segments, False)
    alone = n_samples == 1
    total = (acts.new_empty if alone else acts.new_zeros)(val_grad.shape[1:], dtype=wide)
    samples = list(zip(_split_tokens(acts, segments), _split_tokens(grads, segments), strict=True))
    dots = acts.new_zeros(n_samples, val_grad.shape[0], dtype=torch.float64)
    terms = total.new_empty(min(_DOT, total.numel()))
    for rows in _chunks(total.shape[0], total.shape[1], _BLOCK):
        block, directions = total[rows], val_grad[:, rows].to(wide).flatten(1)
        pieces = [piece for direction in directions for piece in direction.split(_DOT)]
        flat = block.view(-1).split(_DOT) * len(directions)
        product, contracted = block, []
        for s, (a, g) in enumerate(samples):
            if form == "two" and s:
                if s == 1:
                    product = torch.empty_like(block)
                    flat = product.view(-1).split(_DOT) * len(directions)
                product.zero_()  # MKL adds to zeros faster than it overwrites
            of_rows, a = g[:, rows].to(wide).T, a.to(wide)
            torch.mm(of_rows, a, out=product) if alone else product.addmm_(of_rows, a)
            contracted += [torch.mul(x, y, out=terms[: len(x)]).sum() for x, y in zip(pieces, flat, strict=True)]
            if product is not block:
                block += product
        dots += torch.stack(contracted).view(*dots.shape, -1).sum(-1, dtype=dots.dtype)
    if form == "prefix":
        dots = torch.diff(dots, dim=0, prepend=dots.new_zeros(1, dots.shape[1]))
    return total.to(grad_dtype or wide), dots.to(wide)


def ghost_square(acts: Tensor, grads: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """A GEMM per sample and block of rows, squared while it is in cache; of single tokens one GEMM of squares."""
    wide = accumulate_dtype(acts)
    if acts.shape[1] == 1 and acts.shape[2] and segments is None:
        a, g = acts[:, 0].to(wide), grads[:, 0].to(wide)
        size = a.abs().amax(1, keepdim=True)  # of the gradient itself, as a factor's square might overflow
        a, g = (a / torch.where(size == 0, 1, size)).square(), (g * size).square()
        return g.T @ a, (g.sum(1, dtype=torch.float64) * a.sum(1, dtype=torch.float64)).to(wide)
    samples = list(zip(_split_tokens(acts, segments), _split_tokens(grads, segments), strict=True))
    total = acts.new_zeros(grads.shape[2], acts.shape[2], dtype=wide)
    norms = acts.new_zeros(len(samples), dtype=torch.float64)
    for rows in _chunks(total.shape[0], total.shape[1], _BLOCK):
        block, product = total[rows], torch.empty_like(total[rows])
        for s, (a, g) in enumerate(samples):
            torch.mm(g[:, rows].to(wide).T, a.to(wide), out=product).square_()
            block += product
            norms[s] += product.sum()
    return total, norms.to(wide)


def ghost_dot_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor, form: str) -> Tensor:
    """sum_{t,s} (a_t . a_s)(b_t . b_s), a bounded chunk of token pairs at a time.

    In place of "pairwise", "direct": the gradient of one validation sample at a time, and its `ghost_dot`; and
    "gradients": those of all samples on both sides, some rows of the weight at a time, and one product of them.
    """
    (batch, tokens, _), (n_val, val_tokens, _) = acts.shape, val_acts.shape
    wide = accumulate_dtype(acts)
    if form == "direct" and n_val:
        of_samples = (weight_grad(a[None], g[None], wide) for a, g in zip(val_acts, val_grads, strict=True))
        return torch.cat([ghost_dot(acts, grads, d[None], None, False) for d in of_samples], 1)
    if form == "gradients":
        dots = acts.new_zeros(batch, n_val, dtype=wide)
        for rows in _chunks(grads.shape[2], 1, rows_at_a_time((batch + n_val) * acts.shape[2], acts.is_cuda)):
            both = ((acts, grads), (val_acts, val_grads))
            of_rows = [sample_gradients(x, g[..., rows], wide).flatten(1) for x, g in both]
            dots.addmm_(of_rows[0], of_rows[1].T)
        return dots
    out = acts.new_zeros(batch * tokens, n_val, dtype=wide)
    flat_acts, flat_grads = acts.flatten(0, 1), grads.flatten(0, 1)
    for v_part in _chunks(n_val, max(1, val_tokens) * 64, _CHUNK):
        va = val_acts[v_part].to(wide).flatten(0, 1)
        vg = val_grads[v_part].to(wide).flatten(0, 1)
        for part in _chunks(batch * tokens, len(va), _CHUNK):
            pairs = (flat_acts[part].to(wide) @ va.T).mul_(flat_grads[part].to(wide) @ vg.T)
            out[part, v_part] = pairs.unflatten(1, (len(val_acts[v_part]), val_tokens)).sum(-1)
    return reduce_tokens(out, batch, tokens, None, False)


def rows_at_a_time(elements: int, on_gpu: bool) -> int:
    """How many rows of all samples' gradients stand together, if one has so many elements."""
    return max(_FEWEST, _GRADIENTS[on_gpu] // max(1, elements))


def sample_gradients(acts: Tensor, grads: Tensor, wide: torch.dtype) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]` -> `[B,O,I]` in `wide`, the dtype of both or a wider one."""
    if acts.dtype == grads.dtype == wide:
        return torch.bmm(grads.mT, acts)
    if acts.is_cuda and acts.dtype == grads.dtype and acts.dtype.itemsize == 2:
        return torch.bmm(grads.mT, acts, out_dtype=wide)
    out = acts.new_empty(len(acts), grads.shape[2], acts.shape[2], dtype=wide)
    for a, g, of_sample in zip(acts, grads, out, strict=True):
        torch.mm(g.to(wide).T, a.to(wide), out=of_sample)
    return out


def embedding_dot(
    ids: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool, padding_idx: int | None
) -> Tensor:
    """Gather the direction's row of each token and contract it with the token's gradient."""
    batch, tokens, width = grads.shape
    wide = accumulate_dtype(grads)
    flat_ids, flat_grads = ids.flatten(), grads.flatten(0, 1)
    out = grads.new_empty(batch * tokens, val_grad.shape[0], dtype=wide)
    buffer = val_grad.new_empty(max(_ROWS, width))
    for part in _chunks(batch * tokens, width, _ROWS):
        ids_here, g = flat_ids[part], flat_grads[part].to(wide)
        here = buffer[: g.numel()].view_as(g)
        for m, direction in enumerate(val_grad):
            torch.index_select(direction, 0, ids_here, out=here)
            torch.sum(here.to(wide).mul_(g), -1, out=out[part, m])
    if padding_idx is not None:
        out.masked_fill_((flat_ids == padding_idx)[:, None], 0)
    return reduce_tokens(out, batch, tokens, segments, per_token)


def row_dot(normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    """sum_i normed * grads * val_grad (bias: no `normed`), per token, then per sample."""
    batch, tokens, width = grads.shape
    wide = accumulate_dtype(grads)
    flat_grads, flat_normed = grads.flatten(0, 1), None if normed is None else normed.flatten(0, 1)
    out = grads.new_empty(batch * tokens, val_grad.shape[0], dtype=wide)
    directions = val_grad.to(wide).T
    buffer = None if normed is None else grads.new_empty(max(_ROWS, width), dtype=wide)
    for part in _chunks(batch * tokens, width, _ROWS):
        torch.mm(_product(flat_grads[part], flat_normed, part, buffer), directions, out=out[part])
    return reduce_tokens(out, batch, tokens, segments, per_token)


def row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Column sums of each sample, `[S, I]`: their sum is the gradient, their contraction the dots."""
    batch, tokens, width = grads.shape
    wide = accumulate_dtype(grads)
    if segments is None:
        sums = grads.new_zeros(batch, 1, width, dtype=wide)
        ones = sums.new_ones(1, 1, _FEW_ROWS)  # BLAS adds a few wide rows up quicker than torch.sum does
        buffer = None if normed is None else grads.new_empty(max(_ROWS, width), dtype=wide)
        for part in _chunks(batch, tokens * width, _ROWS):
            here = sums[part]
            for span in _chunks(tokens, len(here) * width, _ROWS):
                products = _product(grads[part, span], normed, (part, span), buffer)
                if products.shape[1] > _FEW_ROWS:
                    here += products.sum(1, keepdim=True)
                else:
                    here.baddbmm_(ones[..., : products.shape[1]].expand(len(here), 1, -1), products)
        sums = sums.squeeze(1)
    else:
        sums = grads.new_empty(segments.shape[0] - 1, width, dtype=wide)
        for part in _chunks(width, batch * tokens, _CHUNK):
            products = grads[..., part].to(wide)
            products = products if normed is None else products * normed[..., part]
            sums[:, part] = _segment_sum(products.flatten(0, 1), segments)
    return sums.sum(0), torch.stack([(sums * direction).sum(1) for direction in val_grad.to(wide)], 1)


def _product(grads: Tensor, normed: Tensor | None, part: Any, buffer: Tensor | None) -> Tensor:
    """`grads * normed[part]` in the buffer, widened to its dtype; `grads` alone where there is none."""
    if normed is None or buffer is None:
        return grads.to(accumulate_dtype(grads))
    here = buffer[: grads.numel()].view(grads.shape)
    if grads.dtype == here.dtype == normed.dtype:
        return torch.mul(grads, normed[part], out=here)
    return here.copy_(grads).mul_(normed[part])


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reduce_tokens(per_token: Tensor, batch: int, tokens: int, segments: Tensor | None, keep: bool) -> Tensor:
    """`[B*T, M]` -> `[B, T, M]` (keep), `[S, M]` (segments) or `[B, M]`; sums are float64, in a fixed order."""
    n_directions = per_token.shape[1]
    if keep:
        return per_token.view(batch, tokens, n_directions)
    if segments is None:
        total = per_token.view(batch, tokens, n_directions).sum(1, dtype=torch.float64)
    else:
        total = _segment_sum(per_token, segments)
    return total.to(per_token.dtype)


def weight_grad(acts: Tensor, grads: Tensor, dtype: torch.dtype) -> Tensor:
    """grads^T acts over all tokens in `dtype`, that of `acts` or wider: then widened a chunk at a time."""
    flat_acts, flat_grads = acts.flatten(0, 1), grads.flatten(0, 1)
    if acts.dtype == dtype:
        return flat_grads.T @ flat_acts
    if acts.is_cuda:
        return torch.mm(flat_grads.T, flat_acts, out_dtype=dtype)
    total = acts.new_zeros(grads.shape[2], acts.shape[2], dtype=dtype)
    for part in _chunks(len(flat_acts), acts.shape[2] + grads.shape[2], 4 * _CHUNK):
        total.addmm_(flat_grads[part].to(dtype).T, flat_acts[part].to(dtype))
    return total


def _segment_sum(rows: Tensor, segments: Tensor) -> Tensor:
    """`[B*T, X]` -> `[S, X]` float64, without reading the offsets on the host (they were checked)."""
    return torch.segment_reduce(rows.double(), "sum", offsets=segments.long(), axis=0, initial=0, unsafe=True)


def _split_tokens(x: Tensor, segments: Tensor | None) -> list[Tensor]:
    """One `[tokens, features]` view per sample, or per segment of the flattened tokens."""
    if segments is None:
        return list(x.unbind(0))
    flat, bounds = x.flatten(0, 1), segments.tolist()
    return [flat[low:high] for low, high in pairwise(bounds)]


def _chunks(count: int, width: int, elements: int) -> Iterator[slice]:
    """Slices that cut `count` rows of `width` into pieces of at most `elements` (at least one row; from four on, by
    fours, so that of what is aligned all are)."""
    step = max(1, elements // max(1, width))
    step -= step % 4 if step > 4 else 0
    return (slice(low, min(low + step, count)) for low in range(0, count, step))
