"""The Triton kernels of `wgrad_dot.py`: the loop of blocks that has the weight gradient and the dots, and the second
stage, which adds up pieces of tiles, parts of dots, and a bias's sums.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from inrun_kernels.tiles import contract, tile_order

_ALIKE = tl.constexpr(16)  # columns of a product with ones


@triton.jit
def _count_blocks(offsets_ptr, first, last, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks of tokens in segments first to last; an empty segment has one, of no tokens."""
    blocks = tl.zeros([BLOCK_S], tl.int32)
    for low in range(first, last, BLOCK_S):
        offs_s = low + tl.arange(0, BLOCK_S)
        mask_s = offs_s < last
        starts = tl.load(offsets_ptr + offs_s, mask=mask_s, other=0)
        ends = tl.load(offsets_ptr + offs_s + 1, mask=mask_s, other=0)
        counts = tl.maximum(tl.cdiv(ends - starts, BLOCK_T), 1)
        blocks += tl.where(mask_s, counts, 0).to(tl.int32)
    return tl.sum(blocks, 0)


# How many documents a batch holds changes from step to step, and nothing is gained by a kernel for each kind of number.
@triton.jit(do_not_specialize=["n_samples", "whole", "units", "span", "per"])
def wgrad_dot_kernel(
    acts,  # pointer or descriptor, [B, T, I]
    grads,  # pointer or descriptor, [B, T, O]
    val_grad,  # pointer or descriptor, [M, O, I]; None for squares
    bias_val_grad_ptr,  # [M, O]
    offsets_ptr,
    weight_ptr,  # [O, I]
    bias_ptr,  # [O]
    pieces_ptr,  # [pieces, BLOCK_O, BLOCK_I], float32
    bias_pieces_ptr,  # [pieces, BLOCK_O], float32
    partial_ptr,  # [S, M or 1, row_length]: in a row, of each tile, and with WITHIN of each cut one's second part
    row_length,
    tokens,
    inputs,
    outputs,
    n_samples,  # not read: without it ptxas finds other registers, and spills (float32, "prefix", sm_90)
    whole,  # tiles, the first, that have a program each
    units,  # of a tile's work: samples, or with WITHIN blocks of tokens
    span,  # units from a shared tile's first to the next one's, of which those beyond `units` are empty
    per,  # units of each of the programs that share the other tiles
    carry,
    stride_ab,
    stride_at,
    stride_ai,
    stride_gb,
    stride_gt,
    stride_go,
    stride_dm,
    stride_do,
    stride_di,
    stride_bm,
    stride_bo,
    DIRECTIONS: tl.constexpr,  # 0: squares
    LANES: tl.constexpr,  # directions, rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    COPY_TOKENS: tl.constexpr,
    COPY_D: tl.constexpr,
    KEEP_D: tl.constexpr,
    PREFIX: tl.constexpr,
    WITHIN: tl.constexpr,  # whether a program may begin and end within a sample
    SHARED: tl.constexpr,  # whether there are tiles that programs share
    ASYNCHRONOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tiles = tiles_o * tiles_i
    blocks = tl.cdiv(tokens, BLOCK_T)
    first_tile, last_tile = pid + 0, pid + 1
    begin, end = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if SHARED:  # noqa: SIM102 (known when compiling)
        if pid >= whole:
            begin = (pid - whole).to(tl.int64) * per  # unit by unit, through the tiles that are shared
            end = tl.minimum(begin + per, (tiles - whole).to(tl.int64) * span)
            first_tile = whole + (begin // span).to(tl.int32)
            last_tile = whole + tl.cdiv(end, span).to(tl.int32)
    offs_t = tl.arange(0, BLOCK_T)[:, None]
    offs_tokens = tl.arange(0, BLOCK_T)[None, :]
    lanes = tl.arange(0, LANES)
    # The last tile first: of programs that have the end of one tile and the beginning of another, all are then at the
    # same samples at the same time, or all as far behind, and share what they read in the cache.
    for back in range(last_tile - first_tile):
        tile = last_tile - 1 - back
        low, high = 0, units
        if SHARED:  # noqa: SIM102
            if pid >= whole:
                of_tile = (tile - whole).to(tl.int64) * span
                low = tl.maximum(begin - of_tile, 0).to(tl.int32)
                high = tl.minimum(end - of_tile, units).to(tl.int32)
        pid_o, pid_i = tile_order(tile, tiles_o, tiles_i)
        first_o, first_i = pid_o * BLOCK_O, pid_i * BLOCK_I
        offs_o = first_o.to(tl.int64) + tl.arange(0, BLOCK_O)
        offs_i = first_i.to(tl.int64) + tl.arange(0, BLOCK_I)
        mask_o, mask_i = offs_o < outputs, offs_i < inputs
        mask_w = mask_o[:, None] & mask_i[None, :]
        offs_d = offs_o[:, None] * stride_do + offs_i[None, :] * stride_di
        offs_a = offs_t.to(tl.int64) * stride_at + offs_i[None, :] * stride_ai  # [T, I]
        # The transposed tile itself: what is transposed after it was loaded passes through registers before Hopper.
        offs_g = offs_o[:, None] * stride_go + offs_tokens.to(tl.int64) * stride_gt  # [O, T]

        first = low // blocks if WITHIN else low
        at = low % blocks * BLOCK_T if WITHIN else low * 0  # as token, without offsets; counted, which is quicker
        part = tl.where(at > 0, 1, 0)  # of the first sample, which another program began
        if HAS_OFFSETS:
            n_blocks = _count_blocks(offsets_ptr, low, high, BLOCK_T, 128)
        elif WITHIN:
            n_blocks = high - low
        else:
            n_blocks = (high - low) * blocks
        tl.assume(n_blocks > 0)
        if KEEP_D:
            d = val_grad.load([0, first_o, first_i]).reshape(BLOCK_O, BLOCK_I)
        total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        product = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)  # of this sample; with PREFIX of all so far
        before = tl.zeros([LANES], tl.float32)  # with PREFIX: contractions of all before this sample
        if HAS_BIAS:
            mask_b = offs_o < tl.where(pid_i == 0, outputs, 0)
            total_b, product_b = tl.zeros([BLOCK_O, _ALIKE], tl.float32), tl.zeros([BLOCK_O, _ALIKE], tl.float32)
        sample, row = first - 1 if HAS_OFFSETS else first + 0, tl.cast(0, tl.int64)
        token, left = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
        for block in range(n_blocks):
            # Where the block starts, and how many tokens of its sample are left there.
            if HAS_OFFSETS:
                if left <= 0:
                    sample += 1
                    token = tl.load(offsets_ptr + sample).to(tl.int64)
                    left = tl.load(offsets_ptr + sample + 1).to(tl.int64) - token
            else:
                ended = at >= tokens
                sample += tl.where(ended, 1, 0)
                part = tl.where(ended, 0, part)
                at = tl.where(ended, 0, at)
                row, token = sample.to(tl.int64), at.to(tl.int64)
                left = tokens - token
            if COPY_TOKENS:
                a = acts.load([sample, at, first_i]).reshape(BLOCK_T, BLOCK_I)
                g = tl.trans(grads.load([sample, at, first_o]).reshape(BLOCK_T, BLOCK_O))
            else:
                mask_t = offs_t < left
                a_ptr = acts + row * stride_ab + token * stride_at
                g_ptr = grads + row * stride_gb + token * stride_gt
                a = tl.load(a_ptr + offs_a, mask=mask_t & mask_i[None, :], other=0.0)
                g = tl.load(g_ptr + offs_g, mask=mask_o[:, None] & (offs_tokens < left), other=0.0)
            product = contract(g, a, product, PRECISION)
            if HAS_BIAS:  # noqa: SIM102 (known when compiling)
                if pid_i == 0:
                    ones = tl.full([BLOCK_T, _ALIKE], 1.0, tl.float32).to(g.dtype)
                    product_b = contract(g, ones, product_b, PRECISION)
            ends = left <= BLOCK_T
            if WITHIN:
                ends = ends | (block == n_blocks - 1)
            if ends:
                dots_ptr = partial_ptr + sample.to(tl.int64) * max(DIRECTIONS, 1) * row_length + part * tiles + tile
                if DIRECTIONS == 0:
                    squares = product * product
                    total += squares
                    tl.store(dots_ptr, tl.sum(squares))
                for m in tl.static_range(DIRECTIONS):
                    if COPY_D and not KEEP_D:
                        d = val_grad.load([m, first_o, first_i]).reshape(BLOCK_O, BLOCK_I)
                    elif not COPY_D:
                        d_ptrs = val_grad + tl.cast(m, tl.int64) * stride_dm + offs_d
                        d = tl.load(d_ptrs, mask=mask_w, other=0.0)  # [O, I]
                    dot = tl.sum(product * d.to(tl.float32))
                    if HAS_BIAS:
                        b_ptrs = bias_val_grad_ptr + tl.cast(m, tl.int64) * stride_bm + offs_o * stride_bo
                        b = tl.load(b_ptrs, mask=mask_b, other=0.0)
                        dot += tl.sum(tl.max(product_b, 1) * b.to(tl.float32))
                    if PREFIX:
                        here = lanes == m
                        of_this = dot - tl.sum(tl.where(here, before, 0.0))
                        before = tl.where(here, dot, before)
                        dot = of_this
                    tl.store(dots_ptr + m * row_length, dot)
                if not PREFIX and DIRECTIONS:
                    total += product
                    if HAS_BIAS:
                        total_b += product_b
                        product_b = tl.zeros([BLOCK_O, _ALIKE], tl.float32)
                # Were it known what becomes of the product, the compiler would take the tile out of this branch and
                # read it at every block while the tensor cores write it: hence a choice at run time, or what it cannot
                # look into. n_blocks is known to be positive for the same reason.
                if ASYNCHRONOUS and PREFIX:
                    product = tl.inline_asm_elementwise("", "=r,0", [product], dtype=tl.float32, is_pure=False, pack=1)
                elif ASYNCHRONOUS:
                    product = tl.where(carry > 0, product, 0.0)
                elif not PREFIX:
                    product = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            token += BLOCK_T
            left -= BLOCK_T
            at += BLOCK_T
        if PREFIX:
            total = product
            if HAS_BIAS:
                total_b = product_b
        alone = True
        if SHARED:
            alone = (low == 0) & (high == units)
        if alone:
            if HAS_BIAS:
                bias = tl.max(total_b, 1).to(bias_ptr.dtype.element_ty)
                tl.store(bias_ptr + offs_o, bias, mask=mask_b)
            weight = total.to(weight_ptr.dtype.element_ty)
            tl.store(weight_ptr + offs_o[:, None] * inputs + offs_i[None, :], weight, mask=mask_w)
        elif SHARED:
            piece = (pid + tile - 2 * whole).to(tl.int64)  # another number for each
            rows = tl.arange(0, BLOCK_O)
            if HAS_BIAS:
                tl.store(bias_pieces_ptr + piece * BLOCK_O + rows, tl.max(total_b, 1))
            columns = tl.arange(0, BLOCK_I)[None, :]
            tl.store(pieces_ptr + (piece * BLOCK_O + rows)[:, None] * BLOCK_I + columns, total)


@triton.jit(do_not_specialize=["whole", "units", "span", "per", "n_dots"])
def second_stage_kernel(
    partial_ptr,  # [S, M, row_length]
    sums_ptr,  # [n_sums, O]
    dots_ptr,  # [S, M]
    pieces_ptr,  # [pieces, BLOCK_O, BLOCK_I]
    weight_ptr,  # [O, I]
    bias_pieces_ptr,  # [pieces, BLOCK_O]
    bias_ptr,  # [O]
    row_length,
    n_sums,
    n_dots,
    outputs,
    inputs,
    blocks,
    whole,
    units,
    span,
    per,
    DIRECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,  # of a bias that did not ride along
    WITHIN: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile, which one program adds up
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tiles = tiles_o * tiles_i
    n_columns = tl.cdiv(outputs, BLOCK_B) if HAS_SUMS else 0
    if pid < n_dots:
        of_dot = partial_ptr + pid.to(tl.int64) * row_length
        total = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, tiles, BLOCK_N):
            tile = low + tl.arange(0, BLOCK_N)
            total += tl.load(of_dot + tile, mask=tile < tiles, other=0.0)
            if WITHIN:
                start = (tile - whole).to(tl.int64) * span + pid // DIRECTIONS * blocks
                cut = (tile >= whole) & (start // per != (start + blocks - 1) // per)
                total += tl.load(of_dot + tiles + tile, mask=cut & (tile < tiles), other=0.0)
        if HAS_SUMS:
            for low in range(tiles * (2 if WITHIN else 1), row_length, BLOCK_N):
                offs = low + tl.arange(0, BLOCK_N)
                total += tl.load(of_dot + offs, mask=offs < row_length, other=0.0)
        tl.store(dots_ptr + pid, tl.sum(total))
    elif pid < n_dots + n_columns:
        if HAS_SUMS:
            columns = (pid - n_dots) * BLOCK_B + tl.arange(0, BLOCK_B)
            mask_b = columns < outputs
            of_rows = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
            for low in range(0, n_sums, BLOCK_B):
                rows = low + tl.arange(0, BLOCK_B)
                sums_ptrs = sums_ptr + rows.to(tl.int64)[:, None] * outputs + columns[None, :]
                of_rows += tl.load(sums_ptrs, mask=(rows < n_sums)[:, None] & mask_b[None, :], other=0.0)
            tl.store(bias_ptr + columns, tl.sum(of_rows, 0).to(bias_ptr.dtype.element_ty), mask=mask_b)
    elif SHARED:
        here = pid - n_dots - n_columns
        shared_tile, first_row = here // (BLOCK_O // ROWS), here % (BLOCK_O // ROWS) * ROWS
        start = shared_tile.to(tl.int64) * span
        first, last = start // per, (start + units - 1) // per
        if last > first:
            pid_o, pid_i = tile_order(whole + shared_tile, tiles_o, tiles_i)
            rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_I)
            total = tl.zeros([ROWS, BLOCK_I], tl.float32)
            total_b = tl.zeros([ROWS], tl.float32)
            for program in range(first, last + 1):
                of_piece = (program + shared_tile) * BLOCK_O + rows
                total += tl.load(pieces_ptr + of_piece[:, None] * BLOCK_I + columns[None, :])
                if HAS_BIAS:
                    total_b += tl.load(bias_pieces_ptr + of_piece)
            offs_o, offs_i = pid_o * BLOCK_O + rows, pid_i * BLOCK_I + columns
            offs_w = offs_o.to(tl.int64)[:, None] * inputs + offs_i[None, :]
            mask_w = (offs_o < outputs)[:, None] & (offs_i < inputs)[None, :]
            tl.store(weight_ptr + offs_w, total.to(weight_ptr.dtype.element_ty), mask=mask_w)
            if HAS_BIAS:
                total_b = total_b.to(bias_ptr.dtype.element_ty)
                tl.store(bias_ptr + offs_o, total_b, mask=offs_o < tl.where(pid_i == 0, outputs, 0))
