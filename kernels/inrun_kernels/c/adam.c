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
    enum { AT_ONCE = 512 };
#pragma omp parallel num_threads(threads)
    {
        for (int64_t j = 0; j < n_parts; j++) {
            const adam_part p = parts[j];
            const int aligned = (uintptr_t)p.out % sizeof(vec) == 0;
#pragma omp for schedule(dynamic, 32) nowait
            for (int64_t low = 0; low < p.count; low += AT_ONCE) {
                float some[AT_ONCE] __attribute__((aligned(64)));
                int64_t count = least(AT_ONCE, p.count - low), i = 0;
                const float *grad = p.grad + low, *moment = p.moment + low;
                for (int64_t k = 0; k < count; k++)
                    some[k] = p.share * grad[k] / (sqrtf(p.keep * moment[k] + p.add * grad[k] * grad[k]) + p.eps);
                for (; aligned && i + LANES <= count; i += LANES) stream(p.out + low + i, *(const vec *)(some + i));
                memcpy(p.out + low + i, some + i, 4 * (count - i));
            }
        }
        streamed();
    }
}
