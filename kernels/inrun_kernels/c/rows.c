/* row_wgrad_dot: what a norm's weight earns (without `acts`, a bias), in one pass:

       total[i] = sum_n grads[n, i] acts[n, i]           dots[s, m] = sum_i (s's share of total)[i] dirs[m, i]

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
