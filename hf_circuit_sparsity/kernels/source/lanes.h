/* What the kernels share: vectors of LANES floats, and transposing.
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

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const vec_anywhere *)p; }
static inline void store(float *p, vec v) { *(vec_anywhere *)p = v; }

/* Rows i and i + 8 of a square, interleaved; four times over, that transposes it. */
static inline void interleave(const vec *from, vec *to) {
    for (int i = 0; i < 8; i++) {
        to[2 * i] = __builtin_shufflevector(from[i], from[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20,
                                            5, 21, 6, 22, 7, 23);
        to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + 8], 8, 24, 9, 25, 10, 26, 11, 27,
                                                12, 28, 13, 29, 14, 30, 15, 31);
    }
}

/* to[j][i] = from[i][j] for i < rows, j < columns. */
static void turn(const float *from, int64_t ld_from, int64_t rows, int64_t columns, float *to,
                 int64_t ld_to) {
    const int64_t whole_rows = rows - rows % LANES, whole_columns = columns - columns % LANES;
    for (int64_t i = 0; i < whole_rows; i += LANES)
        for (int64_t j = 0; j < whole_columns; j += LANES) {
            vec a[LANES], b[LANES];
            for (int n = 0; n < LANES; n++) a[n] = load(from + (i + n) * ld_from + j);
            interleave(a, b), interleave(b, a), interleave(a, b), interleave(b, a);
            for (int n = 0; n < LANES; n++) store(to + (j + n) * ld_to + i, a[n]);
        }
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
            to[j * ld_to + i] = from[i * ld_from + j];
}
