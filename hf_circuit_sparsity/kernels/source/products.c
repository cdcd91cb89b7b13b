#include "lanes.h"

/* ---------------------------------------------------------------- C = A B, A with many zeros
 *
 * The nonzeros of A are listed in blocks of BLOCK columns, row by row within a block: `starts`,
 * (blocks, rows + 1), says where in `columns` and `values` a row of a block begins; `columns` count
 * from the beginning of the block. So the rows of B that a block needs, cut to WIDE vectors, stay
 * in the second-level cache while all rows of A go over them, and a row of C stays in registers.
 */

#define BLOCK 1024
#define WIDE 8

/* Appends the nonzeros of one row to the lists; LANES places behind them may be written. */
static inline int64_t append_row(const float *row, int64_t size, int64_t n, uint16_t *columns,
                                 float *values) {
    int64_t j = 0;
#ifdef __AVX512F__
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; j + LANES <= size; j += LANES) {
        const __m512 v = _mm512_loadu_ps(row + j);
        const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)j));
        _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(kept, v));
        _mm256_storeu_si256((void *)(columns + n),
                            _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(kept, at)));
        n += __builtin_popcount(kept);
    }
#endif
    for (; j < size; j++) {
        values[n] = row[j];
        columns[n] = (uint16_t)j;
        n += row[j] != 0;
    }
    return n;
}

/* Lists the nonzeros of A, (rows, width), or of its transpose if A is given turned, (width, rows).
 * starts: (ceil(width / BLOCK), rows + 1), counted from `base`; columns and values: room for `room`
 * nonzeros and LANES more; scratch: (LANES, BLOCK), where A is turned. Returns their number, or -1
 * if they are more than there is room for. */
int64_t list_nonzeros(const float *a, int64_t ld, int64_t rows, int64_t width, int turned,
                      int64_t room, int64_t base, int64_t *starts, uint16_t *columns,
                      float *values, float *scratch) {
    int64_t n = 0;
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t size = first + BLOCK < width ? BLOCK : width - first;
        starts[0] = base + n;
        for (int64_t i = 0; i < rows; i++) {
            const float *row = a + i * ld + first;
            if (turned) {
                const int64_t lane = i % LANES;
                if (!lane)
                    turn(a + first * ld + i, ld, size, i + LANES < rows ? LANES : rows - i, scratch,
                         BLOCK);
                row = scratch + lane * BLOCK;
            }
            if (n + size > room) { /* it may be too many: count before writing */
                int64_t more = 0;
                for (int64_t j = 0; j < size; j++) more += row[j] != 0;
                if (n + more > room) return -1;
            }
            n = append_row(row, size, n, columns, values);
            starts[i + 1] = base + n;
        }
        starts += rows + 1;
    }
    return n;
}
void list_nonzeros_shared(int64_t *a) {
    a[11] = list_nonzeros(AT(0), a[1], a[2], a[3], (int)a[4], a[5], a[6], AT(7), AT(8), AT(9), AT(10));
}

/* Columns [from, to) of C = A B; A, (rows, inner), as listed.
 * B: (inner, ...), or turned (..., inner); scratch: (BLOCK, WIDE * LANES). */
void product(const int64_t *starts, const uint16_t *columns, const float *values, int64_t rows,
             int64_t inner, const float *b, int64_t ld_b, int turned, int64_t from, int64_t to,
             float *scratch, float *c, int64_t ld_c) {
    const int64_t panel = WIDE * LANES;
    for (int64_t left = from; left < to; left += panel) {
        const int64_t wide = left + panel < to ? panel : to - left;
        const int64_t *row_starts = starts;
        for (int64_t first = 0; first < inner; first += BLOCK, row_starts += rows + 1) {
            const int64_t size = first + BLOCK < inner ? BLOCK : inner - first;
            if (turned)
                turn(b + left * ld_b + first, ld_b, wide, size, scratch, panel);
            else
                for (int64_t j = 0; j < size; j++)
                    memcpy(scratch + j * panel, b + (first + j) * ld_b + left, 4 * wide);
            for (int64_t i = 0; i < rows; i++) {
                float *row = c + i * ld_c + left, edge[WIDE * LANES], *sums = row;
                if (wide < panel) sums = memcpy(edge, row, first ? 4 * wide : 0);
                vec sum[WIDE];
                for (int v = 0; v < WIDE; v++) sum[v] = first ? load(sums + v * LANES) : (vec){0};
                for (int64_t n = row_starts[i]; n < row_starts[i + 1]; n++) {
                    const float *b_row = scratch + columns[n] * panel;
                    for (int v = 0; v < WIDE; v++) sum[v] += values[n] * load(b_row + v * LANES);
                }
                for (int v = 0; v < WIDE; v++) store(sums + v * LANES, sum[v]);
                if (wide < panel) memcpy(row, edge, 4 * wide);
            }
        }
    }
}
SHARED(product, AT(0), AT(1), AT(2), a[3], a[4], AT(5), a[6], (int)a[7], a[8], a[9], AT(10), AT(11),
       a[12])

/* ---------------------------------------------------------------- compressed rows (CSR) */

/* Lists the nonzeros of A, (rows, width), row by row; LANES places behind the `room` for them may
 * be written. Returns their number, or -1 if there is no room. starts: (rows + 1,). */
int64_t compress(const float *a, int64_t ld, int64_t rows, int64_t width, int64_t room,
                 int32_t *starts, int32_t *columns, float *values) {
    int64_t n = 0;
    starts[0] = 0;
    for (int64_t i = 0; i < rows; i++) {
        const float *row = a + i * ld;
        int64_t j = 0;
#ifdef __AVX512F__
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (; j + LANES <= width; j += LANES) {
            const __m512 v = _mm512_loadu_ps(row + j);
            const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            if (!kept) continue;
            if (n > room) return -1;
            const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)j));
            _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(kept, v));
            _mm512_storeu_si512(columns + n, _mm512_maskz_compress_epi32(kept, at));
            n += __builtin_popcount(kept);
        }
#endif
        for (; j < width; j++) {
            if (row[j] == 0) continue;
            if (n > room) return -1;
            values[n] = row[j];
            columns[n++] = (int32_t)j;
        }
        starts[i + 1] = (int32_t)n;
    }
    return n > room ? -1 : n;
}

/* The pattern of the transpose, and which entry each of its entries is. next: (width,) scratch. */
void transpose_pattern(const int32_t *starts, const int32_t *columns, int64_t rows, int64_t width,
                       int32_t *next, int32_t *turned_starts, int32_t *turned_columns,
                       int32_t *order) {
    memset(next, 0, 4 * width);
    for (int64_t n = 0; n < starts[rows]; n++) next[columns[n]]++;
    int32_t total = 0;
    for (int64_t j = 0; j < width; j++) {
        const int32_t count = next[j];
        turned_starts[j] = next[j] = total;
        total += count;
    }
    turned_starts[width] = total;
    for (int64_t i = 0; i < rows; i++)
        for (int32_t n = starts[i]; n < starts[i + 1]; n++) {
            const int32_t at = next[columns[n]]++;
            turned_columns[at] = (int32_t)i;
            order[at] = n;
        }
}

/* ---------------------------------------------------------------- Y = X W' + bias, W by its nonzeros
 *
 * PAIR tokens at a time are turned, so that one nonzero is two multiplications of vectors. Sums of
 * nonzeros in turn go side by side, as one sum would wait for each of its additions.
 */

#define PAIR (2 * LANES)

/* PAIR tokens of Y; x: (width, PAIR), turned; y: (rows, PAIR) of LANES rows at a time. */
static void pair_linear(const int32_t *starts, const int32_t *columns, const float *values,
                        int64_t rows, const float *bias, const float *x, float *turned_y, float *y,
                        int64_t ld_y) {
    for (int64_t top = 0; top < rows; top += LANES) {
        const int64_t high = top + LANES < rows ? LANES : rows - top;
        for (int64_t i = 0; i < high; i++) {
            const int32_t end = starts[top + i + 1];
            int32_t n = starts[top + i];
            vec a = (vec){0} + (bias ? bias[top + i] : 0), b = a, c = {0}, d = {0};
            for (; n + 1 < end; n += 2) {
                const float *one = x + (int64_t)columns[n] * PAIR;
                const float *two = x + (int64_t)columns[n + 1] * PAIR;
                a += values[n] * load(one);
                b += values[n] * load(one + LANES);
                c += values[n + 1] * load(two);
                d += values[n + 1] * load(two + LANES);
            }
            if (n < end) {
                const float *one = x + (int64_t)columns[n] * PAIR;
                a += values[n] * load(one);
                b += values[n] * load(one + LANES);
            }
            store(turned_y + i * PAIR, a + c);
            store(turned_y + i * PAIR + LANES, b + d);
        }
        turn(turned_y, PAIR, high, PAIR, y + top, ld_y);
    }
}

/* Tokens [from, to) of Y. starts, columns, values: CSR of W, (rows, width); bias: (rows,) or NULL;
 * scratch: (width + LANES, PAIR). */
void sparse_linear(const int32_t *starts, const int32_t *columns, const float *values, int64_t rows,
                   int64_t width, const float *bias, const float *x, int64_t ld_x, int64_t from,
                   int64_t to, float *scratch, float *y, int64_t ld_y) {
    float *turned_y = scratch + width * PAIR;
    int64_t t = from;
    for (; t + PAIR <= to; t += PAIR) {
        turn(x + t * ld_x, ld_x, PAIR, width, scratch, PAIR);
        pair_linear(starts, columns, values, rows, bias, scratch, turned_y, y + t * ld_y, ld_y);
    }
    for (; t < to; t += LANES) {
        const int64_t tokens = t + LANES < to ? LANES : to - t;
        if (tokens < LANES / 4) { /* turning costs more than it gives */
            for (int64_t s = t; s < t + tokens; s++)
                for (int64_t i = 0; i < rows; i++) {
                    float sum = bias ? bias[i] : 0;
                    for (int32_t n = starts[i]; n < starts[i + 1]; n++)
                        sum += values[n] * x[s * ld_x + columns[n]];
                    y[s * ld_y + i] = sum;
                }
            continue;
        }
        turn(x + t * ld_x, ld_x, tokens, width, scratch, LANES);
        for (int64_t top = 0; top < rows; top += LANES) {
            const int64_t high = top + LANES < rows ? LANES : rows - top;
            for (int64_t i = 0; i < high; i++) {
                vec sum = (vec){0} + (bias ? bias[top + i] : 0);
                for (int32_t n = starts[top + i]; n < starts[top + i + 1]; n++)
                    sum += values[n] * load(scratch + (int64_t)columns[n] * LANES);
                store(turned_y + i * LANES, sum);
            }
            turn(turned_y, LANES, high, tokens, y + t * ld_y + top, ld_y);
        }
    }
}
SHARED(sparse_linear, AT(0), AT(1), AT(2), a[3], a[4], AT(5), AT(6), a[7], a[8], a[9], AT(10), AT(11),
       a[12])

/* ---------------------------------------------------------------- (G' X) at the nonzeros of W
 *
 * Of rows [from, to) of W; g: (rows, tokens) and x: (width, tokens), both turned and padded with
 * zeros to a multiple of TOKENS, in pieces of TOKENS: (tokens / TOKENS, rows, TOKENS). */

#define TOKENS 64

void turn_pieces(const float *a, int64_t ld, int64_t tokens, int64_t from, int64_t to,
                 int64_t width, float *out) {
    for (int64_t t = 0; t < tokens; t += TOKENS, out += width * TOKENS) {
        const int64_t size = t + TOKENS < tokens ? TOKENS : tokens - t;
        turn(a + t * ld + from, ld, size, to - from, out + from * TOKENS, TOKENS);
        for (int64_t j = from; j < to && size < TOKENS; j++)
            memset(out + j * TOKENS + size, 0, 4 * (TOKENS - size));
    }
}
SHARED(turn_pieces, AT(0), a[1], a[2], a[3], a[4], a[5], AT(6))

void gradient_at(const int32_t *starts, const int32_t *columns, int64_t rows, int64_t width,
                 const float *g, const float *x, int64_t tokens, int64_t from, int64_t to,
                 float *out) {
    memset(out + starts[from], 0, 4 * (starts[to] - starts[from]));
    for (int64_t t = 0; t < tokens; t += TOKENS, g += rows * TOKENS, x += width * TOKENS)
        for (int64_t i = from; i < to; i++) {
            const float *row = g + i * TOKENS;
            vec of_row[TOKENS / LANES];
            for (int v = 0; v < TOKENS / LANES; v++) of_row[v] = load(row + v * LANES);
            for (int32_t n = starts[i]; n < starts[i + 1]; n += LANES) {
                const int many = n + LANES < starts[i + 1] ? LANES : starts[i + 1] - n;
                vec s[LANES] = {0};
                for (int k = 0; k < many; k++) {
                    const float *col = x + (int64_t)columns[n + k] * TOKENS;
                    for (int v = 0; v < TOKENS / LANES; v++)
                        s[k] += of_row[v] * load(col + v * LANES);
                }
                const vec sum = sums_of(s);
                if (many == LANES)
                    store(out + n, load(out + n) + sum);
                else
                    for (int k = 0; k < many; k++) out[n + k] += sum[k];
            }
        }
}
SHARED(gradient_at, AT(0), AT(1), a[2], a[3], AT(4), AT(5), a[6], a[7], a[8], AT(9))
