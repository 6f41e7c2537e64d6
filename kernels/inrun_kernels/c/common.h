/* What the kernels share: vectors of the compiler's own, samples, scratch of each thread. */
#include <stdint.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
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
enum { DEPTH = 128 }; /* rows added up at a time */
#if defined(__AVX512BF16__) /* an instruction that multiplies and adds up pairs of bfloat16, twice as many at a time */
enum { PAIRS = 1 };
#else
enum { PAIRS = 0 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    const void *data;
    int64_t stride;   /* elements from row to row */
    int64_t bfloat16; /* else float32 */
} matrix;

typedef struct {
    matrix acts, grads, dirs; /* [N, I], [N, O], [M * O, I]; of rows: normed or none, [N, I], [M, I] */
    matrix bias_dirs;         /* [M, O], or none */
    float *bias;              /* the bias's gradient, [O], or none */
    const int64_t *ends;      /* [S + 1]: sample s has the rows from ends[s] to ends[s + 1] */
    int64_t samples, inputs, outputs, directions;
    int64_t slots, block_inputs, block_outputs, scratch; /* the plan; scratch: bytes of each slot, one for a thread */
    int64_t longest, depth; /* rows of a sample, and of a panel, at most */
    int64_t pairs;          /* 1: operands are packed two rows to an element, both of bfloat16; else 0 */
} product;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE void widen(float *to, matrix x, int64_t at, int64_t count, int bfloat16)
{
    if (!bfloat16) {
        memcpy(to, (const float *)x.data + at, 4 * count);
        return;
    }
    const uint16_t *from = (const uint16_t *)x.data + at;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* Elements in float32, where they are or in the buffer. */
INLINE const float *widened(matrix x, int64_t at, int64_t count, float *buffer)
{
    if (!x.bfloat16) return (const float *)x.data + at;
    widen(buffer, x, at, count, 1);
    return buffer;
}

/* Store what is not read again soon: past the caches where the processor can, which saves reading the old lines. `to`
   is a multiple of the vector's size. */
INLINE void stream(float *to, vec x)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)x);
#elif defined(__SSE__)
    _mm_stream_ps(to, (__m128)x);
#else
    *(vec *)to = x;
#endif
}

/* After the last of a thread's `stream`. */
INLINE void streamed(void)
{
#if defined(__SSE__)
    _mm_sfence();
#endif
}

INLINE float total_of(vec x)
{
    UNROLL for (int half = LANES / 2; half; half /= 2)
        UNROLL for (int lane = 0; lane < half; lane++) x[lane] += x[lane + half];
    return x[0];
}

/* Dots of rows, [N, M], as dots of samples, [S, M]. */
INLINE void sum_rows(const product *p, const double *row_dots, float *dots)
{
    int64_t n_dirs = p->directions;
    for (int64_t s = 0; s < p->samples; s++)
        for (int64_t m = 0; m < n_dirs; m++) {
            double sum = 0;
            for (int64_t row = p->ends[s]; row < p->ends[s + 1]; row++) sum += row_dots[row * n_dirs + m];
            dots[s * n_dirs + m] = sum;
        }
}
