/* adam_directions, in one pass (the formula is in adam.py):

       out = share * grad / (sqrt(keep * moment + add * grad^2) + eps) */
#include <math.h>

#include "common.h"

typedef struct {
    float *out;
    const float *grad, *moment;
    int64_t count;
    float share, keep, add, eps;
} adam_part;

void inrun_adam_directions(const adam_part *parts, int64_t n_parts, int threads)
{
    enum { PIECE = 1 << 14 };
#pragma omp parallel num_threads(threads)
    for (int64_t j = 0; j < n_parts; j++) {
        const adam_part p = parts[j];
#pragma omp for schedule(dynamic) nowait
        for (int64_t low = 0; low < p.count; low += PIECE) {
            int64_t high = least(low + PIECE, p.count);
            for (int64_t i = low; i < high; i++)
                p.out[i] = p.share * p.grad[i] / (sqrtf(p.keep * p.moment[i] + p.add * p.grad[i] * p.grad[i]) + p.eps);
        }
    }
}
