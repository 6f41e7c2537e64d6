/* ghost_wgrad_dot, one blocked matrix product whose tiles are contracted with the directions in registers:

       total[o, i] = sum_n grads[n, o] acts[n, i]        dots[s, m] = sum_{o, i} (s's share of total)[o, i] dirs[m, o, i]

   Without directions it is ghost_square: each sample's tile is squared before it is added, and its own direction; no
   sample is then cut into parts, and its rows, DEPTH or more, are summed in float32.

   The weight is cut into blocks that stay in a core's cache with their directions. For each panel of rows, both
   operands are copied to strips as wide as a tile (Goto and van de Geijn, ACM TOMS 34(3), 2008); a tile of one sample's
   product then lives in registers, where it is contracted before it is added to the total. Nothing of a sample's
   gradient is ever stored. Samples of a single row have no product of their own: they are added to the total together,
   and each row is contracted by itself, sum_i (sum_o grads[n, o] dirs[m, o, i]) acts[n, i].

   A dot's bits do not depend on the rest of the batch (but of single rows taken in pairs, below, on whether there are
   longer samples): panels hold whole samples, or one sample's equal parts. Products
   of a panel's rows at most, and of a dot the terms of one lane and strip, are summed in float32, the rest of a dot in
   float64.

   Operands are widened to float32 as they are copied; where the processor adds up products of pairs of bfloat16 (at
   twice the rate; numbers below 1.2e-38 count as zero), a sample's rows are copied two by two instead, unless all
   samples are single rows.

   FLOPs: 2*N*I*O + (1 + 2*M)*S*I*O; of single rows 2*N*I*O*(1 + M).  Bytes: the operands once for each block that needs
   them, the directions and the total once. */
#include <omp.h>

#include "common.h"

enum {
    WIDTH = LANES * COLS,
    TILE = ROWS * WIDTH,
    OUTPUTS = 192, /* of a block, multiples of any ROWS and WIDTH */
    INPUTS = 384,
    FEW = 256,   /* rows */
    FEWEST = 48, /* columns of a block, where there are threads without one */
    AHEAD = 8,   /* rows copied together, and how far ahead the next are asked for */
};

INLINE int64_t padded(int64_t size, int64_t count, int64_t to) { return ceil_div(ceil_div(size, count), to) * to; }

/* Each slot's scratch: floats, then the dots of its blocks. Returns the bytes of all. */
INLINE int64_t scratch_of(product *p, int64_t floats)
{
    p->scratch = ceil_div(4 * floats + 8 * p->samples * p->directions, 64) * 64;
    return p->scratch * p->slots;
}

INLINE double *dots_of(const product *p, char *scratch, int64_t slot)
{
    return (double *)(scratch + (slot + 1) * p->scratch) - p->samples * p->directions;
}

INLINE void clear_dots(const product *p, char *scratch)
{
    for (int64_t slot = 0; slot < p->slots; slot++) memset(dots_of(p, scratch, slot), 0, 8 * p->samples * p->directions);
}

INLINE void add_up(const product *p, char *scratch, float *dots)
{
    for (int64_t j = 0; j < p->samples * p->directions; j++) {
        double sum = 0;
        for (int64_t slot = 0; slot < p->slots; slot++) sum += dots_of(p, scratch, slot)[j];
        dots[j] = sum;
    }
}

/* Have a row's columns brought to the cache. */
INLINE void ask(matrix x, int64_t row, int64_t column, int columns)
{
    int size = x.bfloat16 ? 2 : 4;
    const char *from = (const char *)x.data + (row * x.stride + column) * size;
    for (int at = 0; at < columns * size; at += 64) __builtin_prefetch(from + at);
}

/* Columns to strips of `width`, the last filled up with zeros; strip by strip, row by row in each. */
INLINE void strips(matrix x, int64_t row, int64_t column, int rows, int columns, int width, int64_t strip, float *out,
                   int bfloat16)
{
    for (int low = 0; low < rows; low += AHEAD)
        for (int c = 0; c < columns; c += width)
            for (int r = low; r < rows && r < low + AHEAD; r++) {
                float *to = out + c / width * strip + r * width;
                int64_t at = (row + r) * x.stride + column + c;
                __builtin_prefetch((const char *)x.data + (at + AHEAD * x.stride) * (bfloat16 ? 2 : 4));
                if (columns - c >= width)
                    widen(to, x, at, width, bfloat16); /* of a length known to the compiler */
                else {
                    widen(to, x, at, columns - c, bfloat16);
                    memset(to + columns - c, 0, 4 * (width - columns + c));
                }
            }
}

typedef uint32_t __attribute__((may_alias)) word;

/* Rows two by two: an element of a strip is a column of both. Beside the last of an odd number are zeros. */
INLINE void pair_strips(matrix x, int64_t row, int64_t column, int rows, int columns, int width, int64_t strip,
                        float *out)
{
    for (int low = 0; low < rows; low += AHEAD)
        for (int c = 0; c < columns; c += width)
            for (int r = low; r < rows && r < low + AHEAD; r += 2) {
                word *to = (word *)(out + c / width * strip + r / 2 * width);
                const uint16_t *first = (const uint16_t *)x.data + (row + r) * x.stride + column + c;
                const uint16_t *second = first + x.stride;
                int count = least(width, columns - c);
                __builtin_prefetch(first + AHEAD * x.stride);
                __builtin_prefetch(second + AHEAD * x.stride);
                if (r + 1 == rows)
                    for (int i = 0; i < count; i++) to[i] = first[i];
                else if (count == width) /* of a length known to the compiler */
                    for (int i = 0; i < width; i++) to[i] = first[i] | (word)second[i] << 16;
                else
                    for (int i = 0; i < count; i++) to[i] = first[i] | (word)second[i] << 16;
                memset(to + count, 0, 4 * (width - count));
            }
}

static void pack(matrix x, int64_t row, int64_t column, int rows, int columns, int width, int64_t strip, float *out)
{
    if (width == ROWS)
        x.bfloat16 ? strips(x, row, column, rows, columns, ROWS, strip, out, 1)
                   : strips(x, row, column, rows, columns, ROWS, strip, out, 0);
    else
        x.bfloat16 ? strips(x, row, column, rows, columns, WIDTH, strip, out, 1)
                   : strips(x, row, column, rows, columns, WIDTH, strip, out, 0);
}

/* Where each of `count` samples begins in a strip, and the last ends: row by row, or pair by pair. */
INLINE void lay_out(const product *p, const int64_t *ends, int64_t count, int64_t *lines)
{
    lines[0] = 0;
    for (int64_t j = 0; j < count; j++) lines[j + 1] = lines[j] + ceil_div(ends[j + 1] - ends[j], 1 + p->pairs);
}

/* An operand's rows of `count` samples to strips, laid out like this. */
static void pack_samples(const product *p, matrix x, const int64_t *ends, const int64_t *lines, int64_t count,
                         int64_t column, int columns, int width, float *out)
{
    int64_t strip = width * lines[count];
    if (!p->pairs) pack(x, ends[0], column, ends[count] - ends[0], columns, width, strip, out);
    for (int64_t j = 0; j < count && p->pairs; j++) {
        int64_t row = ends[j], rows = ends[j + 1] - row;
        float *to = out + width * lines[j];
        if (width == ROWS) pair_strips(x, row, column, rows, columns, ROWS, strip, to);
        else pair_strips(x, row, column, rows, columns, WIDTH, strip, to);
    }
}

/* sum + x * y, of pairs with both products. */
INLINE vec added(vec sum, float x, vec y, int pairs)
{
#if defined(__AVX512BF16__)
    if (pairs) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)y, (__m512bh)_mm512_set1_ps(x));
#else
    (void)pairs;
#endif
    return sum + x * y;
}

/* One tile of one sample. */
INLINE void tile_of(const float *grads, const float *acts, int depth, const float *dirs, int64_t dir_stride,
                    int64_t n_dirs, float *total, vec *dots, int squares, int pairs)
{
    vec product[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) product[r][c] = (vec){0};
    for (int k = 0; k < depth; k++, grads += ROWS, acts += WIDTH)
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLS; c++)
                product[r][c] = added(product[r][c], grads[r], ((const vec *)acts)[c], pairs);
    if (squares) {
        vec sum[COLS] = {0};
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLS; c++) sum[c] += product[r][c] *= product[r][c];
        dots[0] += sum[0] + sum[1];
    }
    for (int64_t m = 0; !squares && m < n_dirs; m++) {
        const vec *dir = (const vec *)(dirs + m * dir_stride);
        vec sum[COLS] = {0};
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLS; c++) sum[c] += product[r][c] * dir[r * COLS + c];
        dots[m] += sum[0] + sum[1];
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) ((vec *)total)[r * COLS + c] += product[r][c];
}

/* Not inlined: compilers then keep all of a tile in registers. */
static __attribute__((noinline)) void square_tile(const float *grads, const float *acts, int depth, float *total,
                                                  vec *dots)
{
    tile_of(grads, acts, depth, NULL, 0, 0, total, dots, 1, 0);
}

static __attribute__((noinline)) void square_tile_of_pairs(const float *grads, const float *acts, int depth,
                                                           float *total, vec *dots)
{
    tile_of(grads, acts, depth, NULL, 0, 0, total, dots, 1, 1);
}

static __attribute__((noinline)) void tile(const float *grads, const float *acts, int depth, const float *dirs,
                                           int64_t dir_stride, int64_t n_dirs, float *total, vec *dots)
{
    tile_of(grads, acts, depth, dirs, dir_stride, n_dirs, total, dots, 0, 0);
}

static __attribute__((noinline)) void tile_of_pairs(const float *grads, const float *acts, int depth, const float *dirs,
                                                    int64_t dir_stride, int64_t n_dirs, float *total, vec *dots)
{
    tile_of(grads, acts, depth, dirs, dir_stride, n_dirs, total, dots, 0, 1);
}

/* The rows of `count` samples with one direction's tile, held in registers. */
static __attribute__((noinline)) void contract(const float *grads, const float *acts, const int64_t *ends,
                                               int64_t count, const float *dirs, int64_t n_dirs, vec *dots)
{
    vec dir[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) dir[r][c] = ((const vec *)dirs)[r * COLS + c];
    for (int64_t j = 0; j < count; j++)
        for (int64_t row = ends[j]; row < ends[j + 1]; row++, grads += ROWS, acts += WIDTH) {
            vec sum[COLS] = {0};
            UNROLL for (int r = 0; r < ROWS; r++)
                UNROLL for (int c = 0; c < COLS; c++) sum[c] += grads[r] * dir[r][c];
            dots[j * n_dirs] += sum[0] * ((const vec *)acts)[0] + sum[1] * ((const vec *)acts)[1];
        }
}

/* One tile of `count` samples, laid out like this. */
static void samples_tile(const product *p, const float *grads, const float *acts, const int64_t *lines, int64_t count,
                         const float *dirs, int64_t dir_stride, float *total, vec *dots)
{
    int64_t n_dirs = p->directions;
    for (int64_t j = 0, next; j < count; j = next) {
        next = j + 1;
        int64_t depth = lines[next] - lines[j];
        const float *g = grads + lines[j] * ROWS, *a = acts + lines[j] * WIDTH;
        if (!p->dirs.data) (p->pairs ? square_tile_of_pairs : square_tile)(g, a, depth, total, dots + j);
        else if (p->pairs) tile_of_pairs(g, a, depth, dirs, dir_stride, n_dirs, total, dots + j * n_dirs);
        else if (depth > 1) tile(g, a, depth, dirs, dir_stride, n_dirs, total, dots + j * n_dirs);
        else {
            while (next < count && lines[next + 1] - lines[next] <= 1) next++;
            tile(g, a, lines[next] - lines[j], NULL, 0, 0, total, NULL);
            for (int64_t m = 0; m < n_dirs; m++)
                contract(g, a, lines + j, next - j, dirs + m * dir_stride, n_dirs, dots + j * n_dirs + m);
        }
    }
}

/* The sum of a pair. */
INLINE float both(const float *pair)
{
    uint32_t bits, high;
    memcpy(&bits, pair, 4);
    float x, y;
    high = bits & 0xffff0000u, bits <<= 16;
    memcpy(&x, &bits, 4), memcpy(&y, &high, 4);
    return x + y;
}

/* The bias's share of one sample: column sums of strips of `grads`, lines `low` to `high` of `depth`. */
static void bias(const product *p, const float *grads, int depth, int low, int high, int64_t first, int outputs,
                 double *dots)
{
    for (int o = 0; o < outputs; o += ROWS) {
        float sum[ROWS] = {0}, buffer[ROWS];
        const float *row = grads + (int64_t)o * depth;
        for (int k = low; k < high; k++)
            for (int r = 0; r < ROWS; r++) sum[r] += p->pairs ? both(row + k * ROWS + r) : row[k * ROWS + r];
        int count = least(ROWS, outputs - o);
        for (int r = 0; r < count; r++) p->bias[first + o + r] += sum[r];
        for (int64_t m = 0; m < p->directions; m++) {
            const float *dir = widened(p->bias_dirs, m * p->bias_dirs.stride + first + o, count, buffer);
            for (int r = 0; r < count; r++) dots[m] += (double)dir[r] * sum[r];
        }
    }
}

/* A block of the weight, for all samples. */
static void block(const product *p, int64_t first_output, int64_t first_input, float *scratch, float *total,
                  double *dots)
{
    int outputs = least(p->block_outputs, p->outputs - first_output);
    int inputs = least(p->block_inputs, p->inputs - first_input);
    int64_t area = p->block_outputs * p->block_inputs, strip = ceil_div(outputs, ROWS) * TILE, n_dirs = p->directions;
    float *sum = scratch, *dirs = sum + area, *grads = dirs + n_dirs * area;
    float *acts = grads + p->depth * p->block_outputs;
    vec *lanes = (vec *)(acts + p->depth * p->block_inputs);
    memset(sum, 0, 4 * area);
    int squares = !p->dirs.data;
    if (outputs % ROWS && !squares) memset(dirs, 0, 4 * n_dirs * area);
    int has_bias = p->bias && !first_input; /* of the blocks beside each other, the first sees to it */
    if (has_bias) memset(p->bias + first_output, 0, 4 * outputs);
    for (int64_t m = 0; m < n_dirs && !squares; m++)
        pack(p->dirs, m * p->outputs + first_output, first_input, outputs, inputs, WIDTH, strip, dirs + m * area);

    for (int64_t s = 0, count; s < p->samples; s += count) {
        const int64_t *ends = p->ends + s;
        int64_t parts = ceil_div(ends[1] - ends[0], p->depth);
        for (count = 1; parts <= 1 && count < DEPTH && s + count < p->samples && ends[count + 1] - ends[0] <= p->depth;)
            count++;
        int64_t rows = parts > 1 ? padded(ends[1] - ends[0], parts, 1 + p->pairs) : ends[count] - ends[0];
        for (int64_t row = ends[0]; row < ends[count]; row += rows) {
            const int64_t part[2] = {row, least(row + rows, ends[count])}, *of = parts > 1 ? part : ends;
            int64_t lines[DEPTH + 1];
            lay_out(p, of, count, lines);
            int64_t depth = lines[count];
            pack_samples(p, p->grads, of, lines, count, first_output, outputs, ROWS, grads);
            pack_samples(p, p->acts, of, lines, count, first_input, inputs, WIDTH, acts);
            for (int64_t j = 0; has_bias && j < count; j++)
                bias(p, grads, depth, lines[j], lines[j + 1], first_output, outputs, dots + (s + j) * n_dirs);
            for (int i = 0; i < inputs; i += WIDTH) {
                memset(lanes, 0, count * n_dirs * sizeof(vec));
                for (int o = 0; o < outputs; o += ROWS) {
                    int64_t at = i / WIDTH * strip + o / ROWS * TILE;
                    samples_tile(p, grads + o * depth, acts + i * depth, lines, count, dirs + at, area, sum + at,
                                 lanes);
                }
                for (int64_t j = 0; j < count * n_dirs; j++)
                    for (int lane = 0; lane < LANES; lane++) dots[s * n_dirs + j] += lanes[j][lane];
            }
        }
    }
    for (int r = 0; r < outputs; r++) {
        const float *from = sum + r * WIDTH;
        float *to = total + (first_output + r) * p->inputs + first_input;
        int i = 0;
        for (; i + WIDTH <= inputs; i += WIDTH, from += strip) memcpy(to + i, from, 4 * WIDTH);
        if (i < inputs) memcpy(to + i, from, 4 * (inputs - i));
    }
}

/* Whether all rows are one panel: directions and total are then met once, where they lie. */
INLINE int is_small(const product *p)
{
    return p->ends[p->samples] <= FEW && p->samples <= DEPTH && p->longest <= DEPTH;
}

/* `block` for few rows. `held`: the first output and input of the operands that are in the scratch already. */
static void small_block(const product *p, int64_t first_output, int64_t first_input, int64_t *held, float *scratch,
                        float *total, double *dots)
{
    int outputs = least(p->block_outputs, p->outputs - first_output);
    int inputs = least(p->block_inputs, p->inputs - first_input);
    int64_t n_dirs = p->directions, stride = p->inputs, lines[DEPTH + 1];
    lay_out(p, p->ends, p->samples, lines);
    int64_t depth = lines[p->samples], squares = !p->dirs.data;
    float *sum = scratch, *dirs = sum + TILE, *grads = dirs + n_dirs * TILE, *acts = grads + FEW * p->block_outputs;
    vec *lanes = (vec *)(acts + FEW * p->block_inputs);
    if (held[0] != first_output)
        pack_samples(p, p->grads, p->ends, lines, p->samples, first_output, outputs, ROWS, grads);
    if (held[1] != first_input) pack_samples(p, p->acts, p->ends, lines, p->samples, first_input, inputs, WIDTH, acts);
    held[0] = first_output, held[1] = first_input;
    if (p->bias && !first_input) {
        memset(p->bias + first_output, 0, 4 * outputs);
        for (int64_t s = 0; s < p->samples; s++)
            bias(p, grads, depth, lines[s], lines[s + 1], first_output, outputs, dots + s * n_dirs);
    }
    for (int i = 0; i < inputs; i += WIDTH) {
        int width = least(WIDTH, inputs - i);
        memset(lanes, 0, p->samples * n_dirs * sizeof(vec));
        for (int o = 0; o < outputs; o += ROWS) {
            int height = least(ROWS, outputs - o);
            float *to = total + (first_output + o) * stride + first_input + i;
            for (int r = 0; r < height; r++)
                for (int c = 0; c < WIDTH; c += 16) __builtin_prefetch(to + r * stride + c, 1);
            if (height < ROWS && !squares) memset(dirs, 0, 4 * n_dirs * TILE);
            for (int64_t m = 0; m < n_dirs && !squares; m++)
                pack(p->dirs, m * p->outputs + first_output + o, first_input + i, height, width, WIDTH, TILE,
                     dirs + m * TILE);
            memset(sum, 0, 4 * TILE);
            int last = o + ROWS >= outputs; /* the next tile's directions are asked for while this one is computed */
            int64_t next = first_output + (last ? 0 : o + ROWS), column = first_input + (last ? i + WIDTH : i);
            for (int64_t m = 0; m < n_dirs && column < p->inputs && !squares; m++)
                for (int64_t r = next; r < least(next + ROWS, p->outputs); r++)
                    ask(p->dirs, m * p->outputs + r, column, WIDTH);
            samples_tile(p, grads + o * depth, acts + i * depth, lines, p->samples, dirs, TILE, sum, lanes);
            for (int r = 0; r < height; r++)
                if (width == WIDTH) memcpy(to + r * stride, sum + r * WIDTH, 4 * WIDTH);
                else memcpy(to + r * stride, sum + r * WIDTH, 4 * width);
        }
        for (int64_t j = 0; j < p->samples * n_dirs; j++)
            for (int lane = 0; lane < LANES; lane++) dots[j] += lanes[j][lane];
    }
}

/* Cut the weight, for at most so many threads. Returns the bytes of scratch. */
static int64_t plan(product *p, int threads)
{
    int64_t outputs = OUTPUTS * 2 / (1 + p->directions), inputs = INPUTS;
    if (outputs < FEWEST) outputs = FEWEST;
    while (ceil_div(p->outputs, outputs) * ceil_div(p->inputs, inputs) < threads && outputs + inputs > 2 * FEWEST)
        *(outputs < inputs ? &inputs : &outputs) /= 2;
    p->block_outputs = padded(p->outputs, ceil_div(p->outputs, outputs), ROWS);
    p->block_inputs = padded(p->inputs, ceil_div(p->inputs, inputs), WIDTH);
    p->slots = least(threads, ceil_div(p->outputs, p->block_outputs) * ceil_div(p->inputs, p->block_inputs));
    p->longest = 0;
    for (int64_t s = 0; s < p->samples; s++)
        if (p->ends[s + 1] - p->ends[s] > p->longest) p->longest = p->ends[s + 1] - p->ends[s];
    p->pairs = PAIRS && p->longest > 1 && p->acts.bfloat16 && p->grads.bfloat16;
    p->depth = p->dirs.data || p->longest <= DEPTH ? DEPTH : ceil_div(p->longest, LANES) * LANES;
    int64_t operands = p->block_outputs + p->block_inputs, lanes = DEPTH * p->directions * LANES;
    if (is_small(p)) return scratch_of(p, (1 + p->directions) * TILE + FEW * operands + lanes);
    return scratch_of(p, (1 + p->directions) * p->block_outputs * p->block_inputs + p->depth * operands + lanes);
}

/* Whether samples of bfloat16 are multiplied in pairs. */
int inrun_pairs(void) { return PAIRS; }

/* total [O, I], dots [S, M]; scratch at a multiple of 64. No size is 0. Returns the bytes of scratch that it needs: with
   less it has done nothing. Teams are as large as torch's, whatever there is to do: libgomp ends what threads a smaller
   one leaves over, and makes them anew for the next. */
int64_t inrun_ghost_wgrad_dot(product *p, float *total, float *dots, char *scratch, int64_t bytes, int threads)
{
    int64_t needed = plan(p, threads);
    if (needed > bytes) return needed;
    int64_t across = ceil_div(p->inputs, p->block_inputs), blocks = across * ceil_div(p->outputs, p->block_outputs);
    clear_dots(p, scratch);
    int small = is_small(p);
#pragma omp parallel num_threads(threads)
    {
        int64_t held[2] = {-1, -1};
#pragma omp for schedule(static)
        for (int64_t at = 0; at < blocks; at++) {
            int64_t slot = blocks < threads ? at : omp_get_thread_num();
            int64_t first_output = at / across * p->block_outputs, first_input = at % across * p->block_inputs;
            float *own = (float *)(scratch + slot * p->scratch);
            double *own_dots = dots_of(p, scratch, slot);
            if (blocks < threads) held[0] = held[1] = -1; /* this scratch is another one */
            if (small) small_block(p, first_output, first_input, held, own, total, own_dots);
            else block(p, first_output, first_input, own, total, own_dots);
        }
    }
    add_up(p, scratch, dots);
    return needed;
}
