/* The products of a training step on a CPU, which BLAS and elementwise passes take twice the time for.

   ghost_wgrad_dot, one blocked matrix product whose tiles are contracted with the directions in registers:

       total[o, i] = sum_n grads[n, o] acts[n, i]        dots[s, m] = sum_{o, i} (s's share of total)[o, i] dirs[m, o, i]

   The weight is cut into blocks that stay in a core's cache with their directions. For each panel of rows, both
   operands are copied to strips as wide as a tile (Goto and van de Geijn, ACM TOMS 34(3), 2008); a tile of one sample's
   product then lives in registers, where it is contracted before it is added to the total. Nothing of a sample's
   gradient is ever stored. A dot's bits do not depend on the rest of the batch: panels hold whole samples, or one
   sample's equal parts. A lane sums one strip's products in float32, all else is summed in float64.

   FLOPs: 2*N*I*O + 2*(1 + M)*S*I*O.  Bytes: the operands once for each block that needs them, the directions and the
   total once.

   row_wgrad_dot, the same of a norm's weight (or, without `normed`, of a bias), in one pass:

       total[i] = sum_n grads[n, i] normed[n, i]         dots[s, m] = sum_i (s's share of total)[i] dirs[m, i]

   layer_norm_dot, along directions of a layer norm's weight and bias, in one pass:

       dots[s, m] = sum_{n of s, i} grads[n, i] ((acts[n, i] - mean[n]) rstd[n] dirs[m, i] + bias_dirs[m, i])

   adam_directions: out = share * grad / (sqrt(keep * moment + add * grad^2) + eps), in one pass (see `adam.py`). */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#endif

#if defined(__AVX512F__) /* LANES to a register; a tile's ROWS * COLS registers leave some for its operands */
enum { LANES = 16, ROWS = 12, COLS = 2 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 6, COLS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 8, COLS = 2 };
#else
enum { LANES = 4, ROWS = 4, COLS = 2 };
#endif
enum {
    WIDTH = LANES * COLS,
    TILE = ROWS * WIDTH,
    DEPTH = 128,  /* rows of a panel: a strip of acts stays in the first cache */
    OUTPUTS = 192, /* of a block, multiples of any ROWS and WIDTH */
    INPUTS = 384,
    FEWEST = 48, /* of either, where there would be too few blocks for all threads */
    AHEAD = 8,  /* rows copied together, and how far ahead the next are asked for */
};
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
typedef struct {
    const void *data;
    int64_t stride; /* elements from row to row */
    int64_t bfloat16; /* else float32 */
} matrix;
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE void widen(float *to, matrix x, int64_t at, int count, int bfloat16)
{
    if (!bfloat16) {
        memcpy(to, (const float *)x.data + at, 4 * count);
        return;
    }
    const uint16_t *from = (const uint16_t *)x.data + at;
    for (int i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
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

static void pack(matrix x, int64_t row, int64_t column, int rows, int columns, int width, int64_t strip, float *out)
{
    if (width == ROWS)
        x.bfloat16 ? strips(x, row, column, rows, columns, ROWS, strip, out, 1)
                   : strips(x, row, column, rows, columns, ROWS, strip, out, 0);
    else
        x.bfloat16 ? strips(x, row, column, rows, columns, WIDTH, strip, out, 1)
                   : strips(x, row, column, rows, columns, WIDTH, strip, out, 0);
}

/* One tile of one sample. Not inlined: compilers then keep all of it in registers. */
static __attribute__((noinline)) void tile(const float *grads, const float *acts, int depth, const float *dirs,
                                           int64_t dir_stride, int64_t n_dirs, float *total, vec *dots)
{
    vec product[ROWS][COLS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) product[r][c] = (vec){0};
    for (int k = 0; k < depth; k++, grads += ROWS, acts += WIDTH)
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLS; c++) product[r][c] += grads[r] * ((const vec *)acts)[c];
    for (int64_t m = 0; m < n_dirs; m++) {
        const vec *dir = (const vec *)(dirs + m * dir_stride);
        vec sum[COLS] = {0};
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < COLS; c++) sum[c] += product[r][c] * dir[r * COLS + c];
        dots[m] += sum[0] + sum[1];
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < COLS; c++) ((vec *)total)[r * COLS + c] += product[r][c];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t padded(int64_t size, int64_t count, int64_t to) { return ceil_div(ceil_div(size, count), to) * to; }

typedef struct {
    matrix acts, grads, dirs; /* [N, I], [N, O], [M * O, I]; of rows: normed or none, [N, I], [M, I] */
    matrix bias_dirs;         /* [M, O]; data 0: no bias */
    float *bias;              /* its gradient, [O] */
    const int64_t *ends;      /* [S + 1]: sample s has the rows from ends[s] to ends[s + 1] */
    int64_t samples, inputs, outputs, directions;
    int64_t threads, block_inputs, block_outputs, scratch; /* the plan; scratch: bytes of each thread */
} product;

/* Each thread's scratch: floats, then the dots of its blocks. */
static int64_t scratch_of(product *p, int64_t floats)
{
    p->scratch = ceil_div(4 * floats + 8 * p->samples * p->directions, 64) * 64;
    return p->scratch * p->threads;
}

static double *dots_of(const product *p, char *scratch, int thread)
{
    return (double *)(scratch + (thread + 1) * p->scratch) - p->samples * p->directions;
}

static void clear_dots(const product *p, char *scratch)
{
    for (int t = 0; t < p->threads; t++) memset(dots_of(p, scratch, t), 0, 8 * p->samples * p->directions);
}

static void add_up(const product *p, char *scratch, float *dots)
{
    for (int64_t j = 0; j < p->samples * p->directions; j++) {
        double sum = 0;
        for (int t = 0; t < p->threads; t++) sum += dots_of(p, scratch, t)[j];
        dots[j] = sum;
    }
}

/* The bias's share of one sample: column sums of strips of `grads`, rows `low` to `high` of `depth`. */
static void bias(const product *p, const float *grads, int depth, int low, int high, int64_t first, int outputs,
                 double *dots)
{
    for (int o = 0; o < outputs; o += ROWS) {
        float sum[ROWS] = {0}, dir[ROWS];
        const float *row = grads + (int64_t)o * depth;
        for (int k = low; k < high; k++)
            for (int r = 0; r < ROWS; r++) sum[r] += row[k * ROWS + r];
        int count = least(ROWS, outputs - o);
        for (int r = 0; r < count; r++) p->bias[first + o + r] += sum[r];
        for (int64_t m = 0; m < p->directions; m++) {
            widen(dir, p->bias_dirs, m * p->bias_dirs.stride + first + o, count, p->bias_dirs.bfloat16);
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
    float *acts = grads + DEPTH * p->block_outputs;
    vec *lanes = (vec *)(acts + DEPTH * p->block_inputs);
    memset(sum, 0, 4 * area);
    if (outputs % ROWS) memset(dirs, 0, 4 * n_dirs * area);
    int has_bias = p->bias && !first_input; /* of the blocks beside each other, the first sees to it */
    if (has_bias) memset(p->bias + first_output, 0, 4 * outputs);
    for (int64_t m = 0; m < n_dirs; m++)
        pack(p->dirs, m * p->outputs + first_output, first_input, outputs, inputs, WIDTH, strip, dirs + m * area);

    for (int64_t s = 0, count; s < p->samples; s += count) {
        const int64_t *ends = p->ends + s;
        int64_t parts = ceil_div(ends[1] - ends[0], DEPTH);
        for (count = 1; parts <= 1 && count < DEPTH && s + count < p->samples && ends[count + 1] - ends[0] <= DEPTH;)
            count++;
        int64_t rows = parts > 1 ? ceil_div(ends[1] - ends[0], parts) : ends[count] - ends[0];
        for (int64_t row = ends[0]; row < ends[count]; row += rows) {
            int depth = least(rows, ends[count] - row);
            pack(p->grads, row, first_output, depth, outputs, ROWS, (int64_t)ROWS * depth, grads);
            pack(p->acts, row, first_input, depth, inputs, WIDTH, (int64_t)WIDTH * depth, acts);
            for (int64_t j = 0; has_bias && j < count; j++)
                bias(p, grads, depth, parts > 1 ? 0 : ends[j] - row, parts > 1 ? depth : ends[j + 1] - row, first_output,
                     outputs, dots + (s + j) * n_dirs);
            for (int i = 0; i < inputs; i += WIDTH) {
                memset(lanes, 0, count * n_dirs * sizeof(vec));
                for (int o = 0; o < outputs; o += ROWS) {
                    int64_t at = i / WIDTH * strip + o / ROWS * TILE;
                    for (int64_t j = 0; j < count; j++) {
                        int64_t low = parts > 1 ? 0 : ends[j] - row, high = parts > 1 ? depth : ends[j + 1] - row;
                        tile(grads + (int64_t)o * depth + low * ROWS, acts + (int64_t)i * depth + low * WIDTH,
                             high - low, dirs + at, area, n_dirs, sum + at, lanes + j * n_dirs);
                    }
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

/* Cut the weight, for at most so many threads. Returns the bytes of scratch. */
static int64_t plan(product *p, int threads)
{
    int64_t outputs = OUTPUTS * 2 / (1 + p->directions), inputs = INPUTS;
    if (outputs < FEWEST) outputs = FEWEST;
    while (ceil_div(p->outputs, outputs) * ceil_div(p->inputs, inputs) < threads && outputs + inputs > 2 * FEWEST)
        *(outputs < inputs ? &inputs : &outputs) /= 2;
    p->block_outputs = padded(p->outputs, ceil_div(p->outputs, outputs), ROWS);
    p->block_inputs = padded(p->inputs, ceil_div(p->inputs, inputs), WIDTH);
    p->threads = least(threads, ceil_div(p->outputs, p->block_outputs) * ceil_div(p->inputs, p->block_inputs));
    return scratch_of(p, (1 + p->directions) * p->block_outputs * p->block_inputs
                             + DEPTH * (p->block_outputs + p->block_inputs + p->directions * LANES));
}

/* total [O, I], dots [S, M]; scratch at a multiple of 64. No size is 0. Returns the bytes of scratch that it needs: with
   less it has done nothing. */
int64_t inrun_ghost_wgrad_dot(product *p, float *total, float *dots, char *scratch, int64_t bytes, int threads)
{
    int64_t needed = plan(p, threads);
    if (needed > bytes) return needed;
    int64_t across = ceil_div(p->inputs, p->block_inputs), blocks = across * ceil_div(p->outputs, p->block_outputs);
    clear_dots(p, scratch);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int64_t at = 0; at < blocks; at++) {
        int t = omp_get_thread_num();
        block(p, at / across * p->block_outputs, at % across * p->block_inputs, (float *)(scratch + t * p->scratch),
              total, dots_of(p, scratch, t));
    }
    add_up(p, scratch, dots);
    return needed;
}

/* The columns from `low` to `high` of the rows' product, for all samples. */
static void columns(const product *p, int64_t low, int64_t high, float *scratch, float *total, double *dots)
{
    int width = high - low;
    float *part = scratch, *of_sample = part + width, *grads = of_sample + width, *normed = grads + width;
    memset(total + low, 0, 4 * width);
    for (int64_t s = 0; s < p->samples; s++) {
        memset(of_sample, 0, 4 * width);
        for (int64_t row = p->ends[s], end = p->ends[s + 1]; row < end;) {
            memset(part, 0, 4 * width);
            for (int64_t stop = least(row + DEPTH, end); row < stop; row++) {
                widen(grads, p->grads, row * p->grads.stride + low, width, p->grads.bfloat16);
                if (p->acts.data) {
                    widen(normed, p->acts, row * p->acts.stride + low, width, p->acts.bfloat16);
                    for (int i = 0; i < width; i++) part[i] += grads[i] * normed[i];
                } else
                    for (int i = 0; i < width; i++) part[i] += grads[i];
            }
            for (int i = 0; i < width; i++) of_sample[i] += part[i];
        }
        for (int i = 0; i < width; i++) total[low + i] += of_sample[i];
        for (int64_t m = 0; m < p->directions; m++) {
            widen(part, p->dirs, m * p->dirs.stride + low, width, p->dirs.bfloat16);
            double sum = 0;
            for (int i = 0; i < width; i++) sum += (double)part[i] * of_sample[i];
            dots[s * p->directions + m] += sum;
        }
    }
}

/* total [I], dots [S, M]; scratch and what is returned as above. */
int64_t inrun_row_wgrad_dot(product *p, float *total, float *dots, char *scratch, int64_t bytes, int threads)
{
    p->threads = least(threads, ceil_div(p->inputs, FEWEST));
    p->block_inputs = padded(p->inputs, p->threads, LANES);
    int64_t needed = scratch_of(p, 4 * p->block_inputs);
    if (needed > bytes) return needed;
    clear_dots(p, scratch);
#pragma omp parallel for schedule(static) num_threads(p->threads)
    for (int t = 0; t < p->threads; t++) {
        int64_t low = t * p->block_inputs, high = least(p->inputs, low + p->block_inputs);
        if (low < high) columns(p, low, high, (float *)(scratch + t * p->scratch), total, dots_of(p, scratch, t));
    }
    add_up(p, scratch, dots);
    return needed;
}

/* Lanes of sum_i g[i] dir[i] (x[i] - mean); without x, of sum_i g[i] dir[i]. */
INLINE vec contracted(const float *g, const float *x, float mean, const float *dir, int64_t width)
{
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec term = *(const loose *)(g + i) * *(const loose *)(dir + i);
        sum += x ? term * (*(const loose *)(x + i) - mean) : term;
    }
    for (; i < width; i++) sum[0] += g[i] * dir[i] * (x ? x[i] - mean : 1);
    return sum;
}

/* mean, rstd [N]; all in float32; one of dirs and bias_dirs may be missing. */
void inrun_layer_norm_dot(const product *p, const float *mean, const float *rstd, float *dots, int threads)
{
    const float *x = p->acts.data, *g = p->grads.data, *scale = p->dirs.data, *shift = p->bias_dirs.data;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t s = 0; s < p->samples; s++)
        for (int64_t m = 0; m < p->directions; m++) {
            double sum = 0;
            for (int64_t row = p->ends[s]; row < p->ends[s + 1]; row++) {
                const float *of_row = g + row * p->grads.stride;
                vec lanes = {0};
                if (scale)
                    lanes = rstd[row] * contracted(of_row, x + row * p->acts.stride, mean[row],
                                                   scale + m * p->dirs.stride, p->inputs);
                if (shift) lanes += contracted(of_row, 0, 0, shift + m * p->bias_dirs.stride, p->inputs);
                for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
            }
            dots[s * p->directions + m] = sum;
        }
}

typedef struct {
    float *out;
    const float *grad, *moment; /* moment: none before the first step */
    int64_t count;
    float share, keep, add, eps;
} adam_part;

void inrun_adam_directions(const adam_part *parts, int64_t n_parts, int threads)
{
    enum { PIECE = 1 << 14 };
#pragma omp parallel num_threads(threads)
    for (int64_t j = 0; j < n_parts; j++) {
        const adam_part p = parts[j];
#pragma omp for schedule(static) nowait
        for (int64_t low = 0; low < p.count; low += PIECE) {
            int64_t high = least(low + PIECE, p.count);
            if (p.moment)
                for (int64_t i = low; i < high; i++)
                    p.out[i] = p.share * p.grad[i] / (sqrtf(p.keep * p.moment[i] + p.add * p.grad[i] * p.grad[i]) + p.eps);
            else
                for (int64_t i = low; i < high; i++)
                    p.out[i] = p.share * p.grad[i] / (sqrtf(p.add * p.grad[i] * p.grad[i]) + p.eps);
        }
    }
}
