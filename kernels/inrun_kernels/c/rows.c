/* row_wgrad_dot: what a norm's weight earns (without `acts`, a bias), in one pass:

       total[i] = sum_n grads[n, i] acts[n, i]           dots[s, m] = sum_i (s's share of total)[i] dirs[m, i]

   row_dot: along directions of a norm's weight or of a bias, or with `ids` of an embedding's rows:

       dots[s, m] = sum_{n of s, i} grads[n, i] acts[n, i] dirs[m, ids[n], i]

   Bits do not depend on the number of threads, a dot's not on the rest of the batch. */
#include "common.h"

enum { PIECE = 1024 }; /* columns at a time */

/* part[i] += sum of `count` rows of grads, each times the row of acts where there are acts. */
INLINE void add_rows(float *part, const float **grads, const float **acts, int count, int64_t width, int has_acts)
{
    for (int64_t i = 0; i < width; i++) {
        float sum = 0;
        UNROLL for (int r = 0; r < count; r++) sum += has_acts ? grads[r][i] * acts[r][i] : grads[r][i];
        part[i] += sum;
    }
}

/* What the pieces of samples say that start in DEPTH rows, in PIECE columns from `low` on; a piece has DEPTH rows of its
   sample, the last one less. */
static void pieces(const product *p, int64_t task, int64_t low, float *total, double *piece_dots)
{
    enum { AT_ONCE = 4 };
    int64_t first = task * DEPTH, beyond = least(first + DEPTH, p->ends[p->samples]), sample = 0, after = p->samples;
    while (after - sample > 1) { /* the last sample that starts no later than the rows */
        int64_t middle = (sample + after) / 2;
        if (p->ends[middle] <= first) sample = middle;
        else after = middle;
    }
    int64_t width = least(PIECE, p->inputs - low);
    memset(total + low, 0, 4 * width);
    for (int64_t s = sample; s < p->samples && p->ends[s] < beyond; s++) {
        int64_t start = p->ends[s], end = p->ends[s + 1];
        if (start < first) start += ceil_div(first - start, DEPTH) * DEPTH;
        if (start >= least(end, beyond)) continue;
        float part[PIECE], buffers[2][AT_ONCE][PIECE];
        memset(part, 0, 4 * width);
        end = least(end, start + DEPTH);
        for (int64_t row = start; row < end; row += AT_ONCE) {
            const float *grads[AT_ONCE], *acts[AT_ONCE];
            int count = least(AT_ONCE, end - row), has_acts = p->acts.data != 0;
            for (int r = 0; r < count; r++) {
                grads[r] = widened(p->grads, (row + r) * p->grads.stride + low, width, buffers[0][r]);
                if (has_acts) acts[r] = widened(p->acts, (row + r) * p->acts.stride + low, width, buffers[1][r]);
            }
            if (count < AT_ONCE)
                for (int r = 0; r < count; r++) add_rows(part, grads + r, acts + r, 1, width, has_acts);
            else if (has_acts)
                add_rows(part, grads, acts, AT_ONCE, width, 1);
            else
                add_rows(part, grads, acts, AT_ONCE, width, 0);
        }
        for (int64_t i = 0; i < width; i++) total[low + i] += part[i];
        for (int64_t m = 0; m < p->directions; m++) {
            const float *dir = widened(p->dirs, m * p->dirs.stride + low, width, buffers[0][0]);
            double sum = 0;
            for (int64_t i = 0; i < width; i++) sum += (double)dir[i] * part[i];
            piece_dots[(task + s) * p->directions + m] = sum;
        }
    }
}

/* total [I], dots [S, M]; scratch and what is returned as in wgrad_dot.c. */
int64_t inrun_row_wgrad_dot(const product *p, float *total, float *dots, char *scratch, int64_t bytes, int threads)
{
    int64_t tasks = ceil_div(p->ends[p->samples], DEPTH), width = p->inputs, n_dirs = p->directions;
    int64_t across = ceil_div(width, PIECE), numbers = (tasks + p->samples) * n_dirs;
    int64_t needed = 8 * across * numbers + 4 * tasks * width;
    double *piece_dots = (double *)scratch;
    float *totals = (float *)(piece_dots + across * numbers);
    if (needed > bytes) return needed;
    memset(piece_dots, 0, 8 * across * numbers);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < tasks * across; at++)
        pieces(p, at / across, at % across * PIECE, totals + at / across * width, piece_dots + at % across * numbers);
    for (int64_t low = 0; low < width; low += PIECE) {
        int64_t count = least(PIECE, width - low);
        double sums[PIECE] = {0};
        for (int64_t task = 0; task < tasks; task++)
            for (int64_t i = 0; i < count; i++) sums[i] += totals[task * width + low + i];
        for (int64_t i = 0; i < count; i++) total[low + i] = sums[i];
    }
    for (int64_t s = 0; s < p->samples; s++)
        for (int64_t m = 0; m < n_dirs; m++) {
            int64_t start = p->ends[s], piece = start / DEPTH + s; /* the number of its first one */
            double sum = 0;
            for (int64_t row = start; row < p->ends[s + 1]; row += DEPTH, piece++)
                for (int64_t k = 0; k < across; k++) sum += piece_dots[k * numbers + piece * n_dirs + m];
            dots[s * n_dirs + m] = sum;
        }
    return needed;
}

/* sum_i g[i] d[i] x[i], without x sum_i g[i] d[i] */
INLINE float contracted(const float *g, const float *d, const float *x, int64_t width)
{
    vec sums[2] = {{0}, {0}};
    int64_t i = 0;
    for (; i + 2 * LANES <= width; i += 2 * LANES)
        UNROLL for (int j = 0; j < 2; j++) {
            vec term = *(const loose *)(g + i + j * LANES) * *(const loose *)(d + i + j * LANES);
            sums[j] += x ? term * *(const loose *)(x + i + j * LANES) : term;
        }
    float rest = 0;
    for (; i < width; i++) rest += g[i] * d[i] * (x ? x[i] : 1);
    return total_of(sums[0] + sums[1]) + rest;
}

/* ids [N] or none, of rows `apart` elements from each other; those equal to `padding` count 0. row_dots [N, M] is
   scratch. */
void inrun_row_dot(const product *p, const int64_t *ids, int64_t apart, int64_t padding, double *row_dots, float *dots,
                   int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p->ends[p->samples]; row++)
        for (int64_t m = 0; m < p->directions; m++) {
            float buffer[PIECE], of_acts[PIECE], of_dirs[PIECE];
            int64_t from = m * p->dirs.stride + (ids ? ids[row] * apart : 0);
            double sum = 0;
            for (int64_t low = 0; low < p->inputs && !(ids && ids[row] == padding); low += PIECE) {
                int64_t count = least(PIECE, p->inputs - low);
                const float *grads = widened(p->grads, row * p->grads.stride + low, count, buffer);
                const float *dirs = widened(p->dirs, from + low, count, of_dirs);
                if (p->acts.data)
                    sum += contracted(grads, dirs, widened(p->acts, row * p->acts.stride + low, count, of_acts), count);
                else
                    sum += contracted(grads, dirs, 0, count);
            }
            row_dots[row * p->directions + m] = sum;
        }
    sum_rows(p, row_dots, dots);
}
