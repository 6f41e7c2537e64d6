/* norm_backward: of layer norm and RMS norm, with every sample's dots, in one pass (the formulas are in norms.py).

   Rows are taken DEPTH at a time, and what these say of the parameters is added up in order: bits do not depend on the
   number of threads. All operands are float32, and I is a multiple of LANES. */
#include <math.h>

#include "common.h"

typedef struct {
    const float *weight, *mean, *rstd; /* mean, rstd [N]; of RMS norm, none */
    float *grad_x;                     /* [N, I] */
    float *sums;                       /* scratch: [pieces, 2, I], of the weight and of the bias */
    double *row_dots;                  /* scratch: [N, M] */
    double eps;                        /* of RMS norm */
} norm;

INLINE vec at(const float *x, int64_t i) { return *(const loose *)(x + i); }

static void norm_row(const product *p, const norm *n, int64_t row, float *weight_sum, float *bias_sum)
{
    const int64_t width = p->inputs;
    const float *x = (const float *)p->acts.data + row * p->acts.stride;
    const float *grads = (const float *)p->grads.data + row * p->grads.stride;
    float mean = n->mean ? n->mean[row] : 0, rstd = n->mean ? n->rstd[row] : 0, *out = n->grad_x + row * width;
    if (!n->mean) {
        vec squares = {0};
        for (int64_t i = 0; i < width; i += LANES) squares += at(x, i) * at(x, i);
        rstd = 1 / sqrt(total_of(squares) / width + n->eps);
    }
    vec h = {0}, h_centred = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        vec product = at(grads, i) * at(n->weight, i);
        h += product;
        h_centred += product * (at(x, i) - mean);
    }
    for (int64_t m = 0; m < p->directions; m++) {
        const float *scale = (const float *)p->dirs.data + m * p->dirs.stride;
        const float *shift = (const float *)p->bias_dirs.data + m * p->bias_dirs.stride;
        vec scaled = {0}, shifted = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            vec g = at(grads, i);
            if (p->dirs.data) scaled += g * at(scale, i) * (at(x, i) - mean);
            if (p->bias_dirs.data) shifted += g * at(shift, i);
        }
        n->row_dots[row * p->directions + m] = total_of(scaled * rstd + shifted);
    }
    float shared = n->mean ? rstd * total_of(h) / width : 0;
    float along = total_of(h_centred) / width * rstd * rstd * rstd; /* from left to right: rstd^3 itself may overflow */
    for (int64_t i = 0; i < width; i += LANES) {
        vec g = at(grads, i), centred = at(x, i) - mean;
        *(loose *)(out + i) = g * at(n->weight, i) * rstd - shared - centred * along;
        *(loose *)(weight_sum + i) = at(weight_sum, i) + g * (centred * rstd);
        *(loose *)(bias_sum + i) = at(bias_sum, i) + g;
    }
}

/* weight_grad [I]; the bias's [I] is p->bias, or none; dots [S, M]. */
void inrun_norm_backward(const product *p, const norm *n, float *weight_grad, float *dots, int threads)
{
    int64_t rows = p->ends[p->samples], pieces = ceil_div(rows, DEPTH), width = p->inputs;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t piece = 0; piece < pieces; piece++) {
        float *sums = n->sums + piece * 2 * width;
        memset(sums, 0, 8 * width);
        for (int64_t row = piece * DEPTH; row < least((piece + 1) * DEPTH, rows); row++)
            norm_row(p, n, row, sums, sums + width);
    }
    memset(weight_grad, 0, 4 * width);
    if (p->bias) memset(p->bias, 0, 4 * width);
    for (int64_t piece = 0; piece < pieces; piece++) {
        const float *sums = n->sums + piece * 2 * width;
        for (int64_t i = 0; i < width; i++) weight_grad[i] += sums[i];
        for (int64_t i = 0; p->bias && i < width; i++) p->bias[i] += sums[width + i];
    }
    sum_rows(p, n->row_dots, dots);
}
