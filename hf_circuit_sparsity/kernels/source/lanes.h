/* What the kernels share: vectors of LANES floats, their sums and exponentials, and transposing.
 *
 * Plain C with the vector extensions of GCC and Clang. Every function works on a range of rows or
 * columns, allocates nothing and keeps nothing: the callers in Python own all memory and split the
 * ranges among threads. Matrices are float32 and row-major; `ld` is the distance between two rows
 * in entries.
 */

#pragma once
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* The arguments of a kernel as `share` passes them: numbers, addresses, the bits of floats. */
#define SHARED(kernel, ...)                                                                        \
    void kernel##_shared(int64_t *a) { kernel(__VA_ARGS__); }
#define AT(i) ((void *)(intptr_t)a[i])

static inline float float_of(int64_t bits) {
    const int32_t low = (int32_t)bits;
    float x;
    memcpy(&x, &low, 4);
    return x;
}

/* As many as a register has: compilers take wider vectors to pieces by way of memory. */
#if defined __AVX512F__
#define LANES 16
#define COUNT_UP 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined __AVX__
#define LANES 8
#define COUNT_UP 0, 1, 2, 3, 4, 5, 6, 7
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define COUNT_UP 0, 1, 2, 3
#define FIRST_HALVES 0, 4, 1, 5
#define SECOND_HALVES 2, 6, 3, 7
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const vec_anywhere *)p; }
static inline void store(float *p, vec v) { *(vec_anywhere *)p = v; }

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec where(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

/* e to the power of x for x up to about 0, to 2 units in the last place; what is NaN stays so. */
static inline vec exponential(vec x) {
#ifdef __AVX512F__
    /* What would be smaller than normal floats takes the processor a hundred cycles: it is 0. */
    const __m512 low = _mm512_set1_ps(-87.0f), inside = _mm512_max_ps(low, (__m512)x); /* NaN stays */
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, low, _CMP_NLT_UQ);
    const __m512 twos = _mm512_roundscale_ps(inside * 1.44269504f, _MM_FROUND_TO_NEAREST_INT);
    const vec whole = (vec)twos, r = ((vec)inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
#else
    const vec low = (vec){0} - 87.0f, inside = where(x < low, low, x);
    const ivec twos = __builtin_convertvector(inside * 1.44269504f - 0.5f, ivec); /* rounds */
    const vec whole = __builtin_convertvector(twos, vec);
    const vec r = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
#endif
    vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_maskz_scalef_ps(normal, (__m512)e, twos);
#else
    e = (vec)((ivec)e + (twos << 23));
    e = where(x < low, (vec){0}, e);
    return where(x == x, e, x);
#endif
}

static inline float largest(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float m = x[0];
    for (int v = 1; v < LANES; v++) m = x[v] > m ? x[v] : m;
    return m;
}

static inline float total(vec x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float s = 0;
    for (int v = 0; v < LANES; v++) s += x[v];
    return s;
}

/* Scores become their exponentials, with `most` taken off each; returns the sum of these. Of n
 * scores, rounded up to LANES. */
static inline float exponentials(float *scores, int64_t n, float most) {
    vec sum = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        const vec e = exponential(load(scores + j) - most);
        store(scores + j, e);
        sum += e;
    }
    return total(sum);
}

/* The lanes of two vectors in turn: of their first halves, and of their second ones. */
#define FIRST(a, b) __builtin_shufflevector(a, b, FIRST_HALVES)
#define SECOND(a, b) __builtin_shufflevector(a, b, SECOND_HALVES)

/* Lane i of what is returned is the sum of the lanes of s[i]; s is overwritten. */
static inline vec sums_of(vec *s) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            s[i] = FIRST(s[i], s[i + half]) + SECOND(s[i], s[i + half]);
    return s[0];
}

/* Transposes a square: rows i and i + LANES / 2 are interleaved until each has one lane of all. */
static inline void transpose(vec *s) {
    for (int round = 1; round < LANES; round *= 2) {
        vec t[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            t[2 * i] = FIRST(s[i], s[i + LANES / 2]);
            t[2 * i + 1] = SECOND(s[i], s[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) s[i] = t[i];
    }
}

/* to[j][i] = from[i][j] for i < rows, j < columns. */
static void turn(const float *from, int64_t ld_from, int64_t rows, int64_t columns, float *to,
                 int64_t ld_to) {
    const int64_t whole_rows = rows - rows % LANES, whole_columns = columns - columns % LANES;
    for (int64_t i = 0; i < whole_rows; i += LANES)
        for (int64_t j = 0; j < whole_columns; j += LANES) {
            vec s[LANES];
            for (int n = 0; n < LANES; n++) s[n] = load(from + (i + n) * ld_from + j);
            transpose(s);
            for (int n = 0; n < LANES; n++) store(to + (j + n) * ld_to + i, s[n]);
        }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            to[j * ld_to + i] = from[i * ld_from + j];
}
