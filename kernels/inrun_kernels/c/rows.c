/* row_wgrad_dot: what a norm's weight earns (without `acts`, a bias), in one pass:

       total[i] = sum_n grads[n, i] acts[n, i]           dots[s, m] = sum_i (s's share of total)[i] dirs[m, i]

   layer_norm_dot: along directions of a layer norm's weight and bias, in one pass:

       dots[s, m] = sum_{n of s, i} grads[n, i] ((acts[n, i] - mean[n]) rstd[n] dirs[m, i] + bias_dirs[m, i])

   Bits do not depend on the rest of the batch, nor on the number of threads but for the sum of a dot's columns. */
#include "common.h"

/* The columns from `low` to `high` of the rows' product, for all samples. */
static void columns(const product *p, int64_t low, int64_t high, float *scratch, float *total, double *dots)
{
    int64_t width = high - low;
    float *part = scratch, *of_sample = part + width, *buffer = of_sample + width, *other = buffer + width;
    memset(total + low, 0, 4 * width);
    for (int64_t s = 0; s < p->samples; s++) {
        memset(of_sample, 0, 4 * width);
        for (int64_t row = p->ends[s], end = p->ends[s + 1]; row < end;) {
            memset(part, 0, 4 * width);
            for (int64_t stop = least(row + DEPTH, end); row < stop; row++) {
                const float *grads = widened(p->grads, row * p->grads.stride + low, width, buffer);
                if (p->acts.data) {
                    const float *normed = widened(p->acts, row * p->acts.stride + low, width, other);
                    for (int64_t i = 0; i < width; i++) part[i] += grads[i] * normed[i];
                } else
                    for (int64_t i = 0; i < width; i++) part[i] += grads[i];
            }
            for (int64_t i = 0; i < width; i++) of_sample[i] += part[i];
        }
        for (int64_t i = 0; i < width; i++) total[low + i] += of_sample[i];
        for (int64_t m = 0; m < p->directions; m++) {
            const float *dir = widened(p->dirs, m * p->dirs.stride + low, width, buffer);
            double sum = 0;
            for (int64_t i = 0; i < width; i++) sum += (double)dir[i] * of_sample[i];
            dots[s * p->directions + m] += sum;
        }
    }
}

/* total [I], dots [S, M]; scratch and what is returned as in wgrad_dot.c. */
int64_t inrun_row_wgrad_dot(product *p, float *total, float *dots, char *scratch, int64_t bytes, int threads)
{
    p->slots = least(threads, ceil_div(p->inputs, FEWEST));
    p->block_inputs = padded(p->inputs, p->slots, LANES);
    int64_t needed = scratch_of(p, 4 * p->block_inputs);
    if (needed > bytes) return needed;
    clear_dots(p, scratch);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t slot = 0; slot < p->slots; slot++) {
        int64_t low = slot * p->block_inputs, high = least(p->inputs, low + p->block_inputs);
        if (low < high)
            columns(p, low, high, (float *)(scratch + slot * p->scratch), total, dots_of(p, scratch, slot));
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

/* mean, rstd [N]; of_row [N, M] is scratch; all operands in float32; one of dirs and bias_dirs may be missing. */
void inrun_layer_norm_dot(const product *p, const float *mean, const float *rstd, double *of_row, float *dots,
                          int threads)
{
    const float *x = p->acts.data, *g = p->grads.data, *scale = p->dirs.data, *shift = p->bias_dirs.data;
    int64_t n_dirs = p->directions;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p->ends[p->samples]; row++)
        for (int64_t m = 0; m < n_dirs; m++) {
            const float *grad = g + row * p->grads.stride;
            vec lanes = {0};
            if (scale)
                lanes = rstd[row] * contracted(grad, x + row * p->acts.stride, mean[row], scale + m * p->dirs.stride,
                                               p->inputs);
            if (shift) lanes += contracted(grad, 0, 0, shift + m * p->bias_dirs.stride, p->inputs);
            double sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
            of_row[row * n_dirs + m] = sum;
        }
    for (int64_t s = 0; s < p->samples; s++)
        for (int64_t m = 0; m < n_dirs; m++) {
            double sum = 0;
            for (int64_t row = p->ends[s]; row < p->ends[s + 1]; row++) sum += of_row[row * n_dirs + m];
            dots[s * n_dirs + m] = sum;
        }
}
