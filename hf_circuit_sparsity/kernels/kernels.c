/* Loops that torch and numpy have no fast form of: AbsTopK, and products with sparse matrices.
 *
 * Plain C with the vector extensions of GCC and Clang. Every function works on a range of rows or
 * columns, allocates nothing and keeps nothing: the callers in Python own all memory and split the
 * ranges among threads. Matrices are float32 and row-major; `ld` is the distance between two rows
 * in entries.
 */

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

/* ---------------------------------------------------------------- AbsTopK
 *
 * Magnitudes of floats are ordered as their bits without the sign are. The threshold is looked for
 * among these bits: entries that reach a guess are counted, the range in which the threshold must
 * lie is narrowed down until few entries are in it, and it is settled on a list of those. Rows of
 * one matrix are alike, so the threshold of one row is the first guess for the next.
 */

#define FEW 256 /* entries settled on a list */
#define MAGNITUDE 0x7fffffffu /* the bits of a float without its sign */
#define INFINITE 0x7f800000u

static void count_reaching(const float *x, int64_t width, const uint32_t threshold[2],
                           int64_t count[2]) {
    const uint32_t *bits = (const uint32_t *)x;
    const uint32_t a = threshold[0], b = threshold[1];
    int32_t in_a = 0, in_b = 0;
    for (int64_t j = 0; j < width; j++) {
        const uint32_t m = bits[j] & MAGNITUDE;
        in_a += m >= a;
        in_b += m >= b;
    }
    count[0] = in_a, count[1] = in_b;
}

/* Lists the magnitudes in [low, high); the caller knows that there are at most FEW. */
static int list_between(const float *x, int64_t width, uint32_t low, uint32_t high,
                        uint32_t *list) {
    const uint32_t *bits = (const uint32_t *)x;
    int n = 0;
    int64_t j = 0;
#ifdef __AVX512F__
    const __m512i sign = _mm512_set1_epi32(MAGNITUDE), from = _mm512_set1_epi32((int)low);
    const __m512i range = _mm512_set1_epi32((int)(high - low));
    for (; j + LANES <= width; j += LANES) {
        const __m512i m = _mm512_and_si512(_mm512_loadu_si512(bits + j), sign);
        const __mmask16 in = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(m, from), range);
        if (in) {
            _mm512_storeu_si512(list + n, _mm512_maskz_compress_epi32(in, m));
            n += __builtin_popcount(in);
        }
    }
#endif
    for (; j < width; j++) {
        const uint32_t m = bits[j] & MAGNITUDE;
        list[n] = m;
        n += m - low < high - low;
    }
    return n;
}

/* The two thresholds a row is looked at with first: what was right for the row before. */
struct guess {
    uint32_t low, high;
};

/* A threshold that k entries of the row reach, 1 <= k <= width: the k-th largest magnitude or a
 * little less. Where that one is not unique more entries reach it; `*reaching` says how many. */
static uint32_t find_threshold(const float *x, int64_t width, int64_t k, struct guess *guess,
                               int64_t *reaching) {
    uint32_t low = 0, high = 0x80000000u; /* reached by n_low >= k and by n_high < k entries */
    int64_t n_low = width, n_high = 0;
    uint32_t tried[2] = {guess->low, guess->high};
    for (int round = 0; n_low - n_high > FEW && high - low > 1 && n_low != k; round++) {
        int64_t count[2];
        if (round) {
            const double gap = high - low, share = gap / (double)(n_low - n_high);
            const int closed = low > 0 && high < INFINITE;
            if (closed && round < 5) { /* where a line through both counts has k, and around it */
                const double at = low + (double)(n_low - k) * share, reach = FEW / 4 * share;
                tried[0] = at - reach < low ? low : (uint32_t)(at - reach);
                tried[1] = at + reach > high ? high : (uint32_t)(at + reach);
            } else if (!closed && round < 8) { /* the row before was otherwise: go on, faster */
                const uint32_t step = 1u << (17 + 2 * round);
                tried[0] = low ? low + step : high > 2 * step ? high - 2 * step : 1;
                tried[1] = low ? low + 4 * step : high > step ? high - step : 1;
            } else {
                tried[0] = low + (uint32_t)(gap / 3);
                tried[1] = low + (uint32_t)(gap / 3 * 2);
            }
        }
        for (int i = 0; i < 2; i++) {
            if (tried[i] <= low) tried[i] = low + 1;
            if (tried[i] >= high) tried[i] = high - 1;
        }
        count_reaching(x, width, tried, count);
        for (int i = 0; i < 2; i++) {
            if (count[i] >= k && tried[i] > low) low = tried[i], n_low = count[i];
            if (count[i] < k && tried[i] < high) high = tried[i], n_high = count[i];
        }
    }
    const double share = (double)(high - low) / (double)(n_low - n_high);
    if (high - low > 1 && n_low != k) {
        uint32_t list[FEW + LANES], above = high;
        const int n = list_between(x, width, low, high, list);
        while (above - low > 1 && n_low != k) {
            const uint32_t middle = low + (above - low) / 2;
            int32_t reach = 0;
            for (int i = 0; i < n; i++) reach += list[i] >= middle;
            if (n_high + reach >= k)
                low = middle, n_low = n_high + reach;
            else
                above = middle;
        }
    }
    *reaching = n_low;
    const double around = share * (FEW * 3 / 8);
    guess->low = low > around + 1 ? low - (uint32_t)around : 1;
    guess->high = low + around < INFINITE ? low + (uint32_t)around + 1 : INFINITE;
    return low;
}

/* AbsTopK of `rows` rows: of each the k largest magnitudes, the first of equals.
 * out: (rows, width) the kept entries and zeros, or NULL; mask: (rows, width) bytes, or NULL. */
void abs_topk(const float *x, int64_t ld, int64_t rows, int64_t width, int64_t k, float *out,
              uint8_t *mask) {
    struct guess guess = {0x3f000000u, 0x3f800000u}; /* 0.5 and 1 */
    for (int64_t i = 0; i < rows; i++, x += ld) {
        const uint32_t *bits = (const uint32_t *)x;
        int64_t reaching;
        const uint32_t threshold = find_threshold(x, width, k, &guess, &reaching);
        if (out) {
            uint32_t *o = (uint32_t *)(out + i * width);
            for (int64_t j = 0; j < width; j++)
                o[j] = (bits[j] & MAGNITUDE) >= threshold ? bits[j] : 0;
        }
        if (mask) {
            uint8_t *m = mask + i * width;
            for (int64_t j = 0; j < width; j++) m[j] = (bits[j] & MAGNITUDE) >= threshold;
        }
        /* The last of the equals are too many. Zeros need no care where only values are wanted. */
        for (int64_t j = width - 1; reaching > k && (mask || threshold) && j >= 0; j--) {
            if ((bits[j] & MAGNITUDE) != threshold) continue;
            if (out) out[i * width + j] = 0;
            if (mask) mask[i * width + j] = 0;
            reaching--;
        }
    }
}

/* out = where(mask, grad, 0): the gradient of AbsTopK. */
void masked(const float *grad, const uint8_t *mask, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j++) out[j] = mask[j] ? grad[j] : 0;
}

/* ---------------------------------------------------------------- the projection's passes */

/* Lists the entries of `a` whose magnitude is in [low, high): where they are, counted from `first`,
 * and the magnitude's bits. LANES places behind the `room` for them may be written.
 * above: how many entries are at or above `high`; by_row: the same of each `width` entries, or NULL.
 * Returns the number listed, -1 if there is no room for them, or -2 - i where entry i is NaN or
 * infinite. n is a multiple of width. */
int64_t list_range(const float *a, int64_t n, int64_t width, uint32_t low, uint32_t high,
                   int64_t first, int64_t room, int64_t *at, uint32_t *magnitude, int64_t *above,
                   int64_t *by_row) {
    const uint32_t *bits = (const uint32_t *)a;
    int64_t listed = 0;
    *above = 0;
    for (int64_t start = 0; start < n; start += width) {
        const int64_t end = start + width;
        int64_t over = 0, j = start;
#ifdef __AVX512F__
        const __m512i sign = _mm512_set1_epi32(MAGNITUDE), top = _mm512_set1_epi32(INFINITE);
        const __m512i from = _mm512_set1_epi32((int)low), upto = _mm512_set1_epi32((int)high);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (; j + LANES <= end; j += LANES) {
            const __m512i m = _mm512_and_si512(_mm512_loadu_si512(bits + j), sign);
            const __mmask16 reach = _mm512_cmpge_epu32_mask(m, from);
            if (!reach) continue;
            if (_mm512_mask_cmpge_epu32_mask(reach, m, top)) break; /* looked at one by one */
            const __mmask16 beyond = _mm512_mask_cmpge_epu32_mask(reach, m, upto);
            over += __builtin_popcount(beyond);
            const __mmask16 in = reach & ~beyond;
            if (!in) continue;
            if (listed > room) return -1;
            const __m512i place = _mm512_maskz_compress_epi32(in, lanes);
            const __m512i base = _mm512_set1_epi64(first + j);
            _mm512_storeu_si512(magnitude + listed, _mm512_maskz_compress_epi32(in, m));
            _mm512_storeu_si512(at + listed,
                                _mm512_add_epi64(base, _mm512_cvtepu32_epi64(
                                                           _mm512_castsi512_si256(place))));
            _mm512_storeu_si512(at + listed + 8,
                                _mm512_add_epi64(base, _mm512_cvtepu32_epi64(
                                                           _mm512_extracti64x4_epi64(place, 1))));
            listed += __builtin_popcount(in);
        }
#endif
        for (; j < end; j++) {
            const uint32_t m = bits[j] & MAGNITUDE;
            if (m < low) continue;
            if (m >= INFINITE) return -2 - j;
            if (m >= high) {
                over++;
                continue;
            }
            if (listed > room) return -1;
            at[listed] = first + j, magnitude[listed++] = m;
        }
        *above += over;
        if (by_row) by_row[start / width] = over;
    }
    return listed > room ? -1 : listed;
}

/* Zeroes what is below the threshold. */
void zero_below(float *a, int64_t n, uint32_t threshold) {
    uint32_t *bits = (uint32_t *)a;
    for (int64_t j = 0; j < n; j++) bits[j] = (bits[j] & MAGNITUDE) >= threshold ? bits[j] : 0;
}

/* ---------------------------------------------------------------- transposing */

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
 * starts: (ceil(width / BLOCK), rows + 1); columns and values: room for `room` nonzeros and LANES
 * more; scratch: (LANES, BLOCK), where A is turned. Returns their number, or -1 if they are more
 * than there is room for. */
int64_t list_nonzeros(const float *a, int64_t ld, int64_t rows, int64_t width, int turned,
                      int64_t room, int64_t *starts, uint16_t *columns, float *values,
                      float *scratch) {
    int64_t n = 0;
    for (int64_t first = 0; first < width; first += BLOCK) {
        const int64_t size = first + BLOCK < width ? BLOCK : width - first;
        starts[0] = n;
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
            starts[i + 1] = n;
        }
        starts += rows + 1;
    }
    return n;
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

/* The compressed rows of the transpose. next: (width,) scratch. */
void transpose_compressed(const int32_t *starts, const int32_t *columns, const float *values,
                          int64_t rows, int64_t width, int32_t *next, int32_t *turned_starts,
                          int32_t *turned_columns, float *turned_values) {
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
            turned_values[at] = values[n];
        }
}

/* ---------------------------------------------------------------- Y = X W' + bias, W by its nonzeros
 *
 * LANES tokens at a time are turned, so that one nonzero is one multiplication of vectors.
 */

/* Tokens [from, to) of Y. starts, columns, values: CSR of W, (rows, width); bias: (rows,) or NULL;
 * scratch: (width + LANES, LANES). */
void sparse_linear(const int32_t *starts, const int32_t *columns, const float *values, int64_t rows,
                   int64_t width, const float *bias, const float *x, int64_t ld_x, int64_t from,
                   int64_t to, float *scratch, float *y, int64_t ld_y) {
    float *turned_y = scratch + width * LANES;
    for (int64_t t = from; t < to; t += LANES) {
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

void gradient_at(const int32_t *starts, const int32_t *columns, int64_t rows, int64_t width,
                 const float *g, const float *x, int64_t tokens, int64_t from, int64_t to,
                 float *out) {
    memset(out + starts[from], 0, 4 * (starts[to] - starts[from]));
    for (int64_t t = 0; t < tokens; t += TOKENS, g += rows * TOKENS, x += width * TOKENS)
        for (int64_t i = from; i < to; i++) {
            const float *row = g + i * TOKENS;
            const vec a = load(row), b = load(row + LANES), c = load(row + 2 * LANES),
                      d = load(row + 3 * LANES);
            for (int32_t n = starts[i]; n < starts[i + 1]; n++) {
                const float *col = x + (int64_t)columns[n] * TOKENS;
                const vec s = a * load(col) + b * load(col + LANES) + c * load(col + 2 * LANES) +
                              d * load(col + 3 * LANES);
                float sum = 0;
                for (int v = 0; v < LANES; v++) sum += s[v];
                out[n] += sum;
            }
        }
}

/* ---------------------------------------------------------------- causal attention with a sink
 *
 * One sequence and head at a time, whose keys and values then lie in the first cache. Scores of a
 * query are computed for LANES keys at once, from keys and values of which LANES at a time are
 * turned to (channels, keys).
 * Matrices of a head are (tokens, channels); see `struct heads` for where they are.
 */

typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define FAR -1e30f /* the score of a key that comes after the query; exp of it is 0 */
#define QUERIES 4  /* that share what is read and written of the keys */

/* Where the matrices of sequences and heads begin, and how far apart tokens are. */
struct heads {
    float *data;
    int64_t sequence, head, token;
};

static inline float *head_of(const struct heads *h, int64_t sequence, int64_t head) {
    return h->data + sequence * h->sequence + head * h->head;
}

static inline vec where(ivec mask, vec yes, vec no) {
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

/* e to the power of x for x up to about 0, to 2 units in the last place; what is NaN stays so. */
static inline vec exponential(vec x) {
    const vec low = (vec){0} - 87.0f, inside = where(x < low, low, x);
    const ivec twos = __builtin_convertvector(inside * 1.44269504f - 0.5f, ivec); /* rounds */
    const vec whole = __builtin_convertvector(twos, vec);
    const vec r = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1.0f;
    e = (vec)((ivec)e + (twos << 23));
    e = where(x < low, (vec){0}, e);
    return where(x == x, e, x);
}

static inline float largest(vec x) {
    float m = x[0];
    for (int v = 1; v < LANES; v++) m = x[v] > m ? x[v] : m;
    return m;
}

static inline float total(vec x) {
    float s = 0;
    for (int v = 0; v < LANES; v++) s += x[v];
    return s;
}

/* Scaled products of a query with LANES keys; those after the query, number `i`, are FAR. */
static inline vec scores(const float *query, const float *turned, int64_t first, int64_t i,
                         int width, float scale) {
    const float *keys = turned + first * width;
    vec even = {0}, odd = {0};
    for (int c = 0; c < width; c += 2) {
        even += query[c] * load(keys + c * LANES);
        odd += query[c + 1] * load(keys + (c + 1) * LANES);
    }
    const vec s = (even + odd) * scale;
    if (first + LANES <= i + 1) return s;
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return where(lane <= (int32_t)(i - first), s, (vec){0} + FAR);
}

/* The matrix of a head as one piece: rows at the distance of tokens would share cache sets. */
static inline void gather(const float *from, int64_t ld, int64_t tokens, int width, float *to) {
    for (int64_t t = 0; t < tokens; t++) memcpy(to + t * width, from + t * ld, 4 * width);
}

/* LANES tokens after LANES tokens, each piece turned to (channels, tokens); behind them zeros. */
static inline void turn_by_lanes(const float *from, int64_t ld, int64_t tokens, int width,
                                 float *to) {
    for (int64_t t = 0; t < tokens; t += LANES) {
        const int64_t size = t + LANES < tokens ? LANES : tokens - t;
        if (size < LANES) memset(to + t * width, 0, 4 * width * LANES);
        turn(from + t * ld, ld, size, width, to + t * width, LANES);
    }
}

static inline __attribute__((always_inline)) void attend_head(
    const float *q, int64_t ld_q, const float *k, int64_t ld_k, const float *v, int64_t ld_v,
    int64_t tokens, const int width, float scale, float sink, float *out, int64_t ld_out,
    float *log_sum, float *scratch) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    float *turned = scratch, *values = turned + width * padded, *weights = values + width * padded;
    turn_by_lanes(k, ld_k, tokens, width, turned);
    gather(v, ld_v, tokens, width, values);
    for (int64_t i = 0; i < tokens; i++) {
        const float *query = q + i * ld_q;
        vec top = (vec){0} + sink;
        for (int64_t j = 0; j <= i; j += LANES) {
            const vec s = scores(query, turned, j, i, width, scale);
            store(weights + j, s);
            top = where(s > top, s, top);
        }
        const float most = largest(top);
        vec sum = {0};
        for (int64_t j = 0; j <= i; j += LANES) {
            const vec e = exponential(load(weights + j) - most);
            store(weights + j, e);
            sum += e;
        }
        const float all = total(sum) + exponential((vec){0} + (sink - most))[0];
        log_sum[i] = most + __builtin_logf(all);
        vec mixed[4] = {{0}}, others[4] = {{0}};
        int64_t j = 0;
        for (; j + 1 <= i; j += 2)
            for (int n = 0; n < width / LANES; n++) {
                mixed[n] += weights[j] * load(values + j * width + n * LANES);
                others[n] += weights[j + 1] * load(values + (j + 1) * width + n * LANES);
            }
        for (int n = 0; n < width / LANES; n++) {
            if (j == i) mixed[n] += weights[j] * load(values + j * width + n * LANES);
            store(out + i * ld_out + n * LANES, (mixed[n] + others[n]) / all);
        }
    }
}

static inline __attribute__((always_inline)) void attend_head_back(
    const float *q, int64_t ld_q, const float *k, int64_t ld_k, const float *v, int64_t ld_v,
    const float *out, int64_t ld_out, const float *g, int64_t ld_g, const float *log_sum,
    int64_t tokens, const int width, float scale, float sink, float *grad_q, float *grad_k,
    float *grad_v, int64_t ld_grad, float *grad_sink, float *scratch) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    float *turned_k = scratch, *turned_v = turned_k + width * padded;
    float *keys = turned_v + width * padded, *of_k = keys + width * padded;
    float *of_v = of_k + width * padded, *p = of_v + width * padded, *ds = p + QUERIES * padded;
    const int vecs = width / LANES;
    turn_by_lanes(k, ld_k, tokens, width, turned_k);
    turn_by_lanes(v, ld_v, tokens, width, turned_v);
    gather(k, ld_k, tokens, width, keys);
    memset(of_k, 0, 8 * width * padded); /* of_v too */
    for (int64_t first = 0; first < tokens; first += QUERIES) {
        const int64_t queries = first + QUERIES < tokens ? QUERIES : tokens - first;
        const int64_t seen = first + queries; /* keys up to the last of these queries */
        for (int64_t a = 0; a < QUERIES; a++) {
            const int64_t i = first + a;
            float *p_row = p + a * padded, *ds_row = ds + a * padded;
            if (a >= queries) {
                memset(p_row, 0, 4 * padded), memset(ds_row, 0, 4 * padded);
                continue;
            }
            vec through = {0};
            for (int n = 0; n < vecs; n++)
                through += load(g + i * ld_g + n * LANES) * load(out + i * ld_out + n * LANES);
            const float delta = total(through);
            *grad_sink -= exponential((vec){0} + (sink - log_sum[i]))[0] * delta;
            for (int64_t j = 0; j < seen; j += LANES) {
                const vec s = scores(q + i * ld_q, turned_k, j, i, width, scale);
                const vec e = exponential(s - log_sum[i]);
                /* Of keys after the query e is 0, and so is what follows. */
                const vec dp = scores(g + i * ld_g, turned_v, j, tokens, width, 1.0f);
                store(p_row + j, e);
                store(ds_row + j, e * (dp - delta) * scale);
            }
            vec sum[4] = {{0}}, other[4] = {{0}};
            for (int64_t j = 0; j <= i; j += 2)
                for (int n = 0; n < vecs; n++) {
                    sum[n] += ds_row[j] * load(keys + j * width + n * LANES);
                    if (j < i) other[n] += ds_row[j + 1] * load(keys + (j + 1) * width + n * LANES);
                }
            for (int n = 0; n < vecs; n++)
                store(grad_q + i * ld_grad + n * LANES, sum[n] + other[n]);
        }
        vec query[QUERIES][4], up[QUERIES][4];
        for (int a = 0; a < QUERIES; a++)
            for (int n = 0; n < vecs; n++) {
                const int64_t i = first + (a < queries ? a : 0);
                query[a][n] = load(q + i * ld_q + n * LANES);
                up[a][n] = load(g + i * ld_g + n * LANES);
            }
        for (int64_t j = 0; j < seen; j++)
            for (int n = 0; n < vecs; n++) {
                float *to_k = of_k + j * width + n * LANES, *to_v = of_v + j * width + n * LANES;
                vec dk = load(to_k), dv = load(to_v);
                for (int a = 0; a < QUERIES; a++) {
                    dk += ds[a * padded + j] * query[a][n];
                    dv += p[a * padded + j] * up[a][n];
                }
                store(to_k, dk), store(to_v, dv);
            }
    }
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(grad_k + t * ld_grad, of_k + t * width, 4 * width);
        memcpy(grad_v + t * ld_grad, of_v + t * width, 4 * width);
    }
}

/* Heads [from, to) of all sequences' heads. width: channels of a head, LANES or a small multiple.
 * sink: (heads,); log_sum: (sequences * heads, tokens), of the softmax denominator with the sink.
 * scratch: (2 * width + 1, tokens rounded up to LANES). */
void attend(const struct heads *q, const struct heads *k, const struct heads *v, int64_t heads,
            int64_t tokens, int64_t width, float scale, const float *sink, int64_t from, int64_t to,
            const struct heads *out, float *log_sum, float *scratch) {
    for (int64_t n = from; n < to; n++) {
        const int64_t b = n / heads, h = n % heads;
#define HEAD(W)                                                                                    \
    attend_head(head_of(q, b, h), q->token, head_of(k, b, h), k->token, head_of(v, b, h),          \
                v->token, tokens, W, scale, sink[h], head_of(out, b, h), out->token,               \
                log_sum + n * tokens, scratch)
        if (width == LANES)
            HEAD(LANES);
        else if (width == 2 * LANES)
            HEAD(2 * LANES);
        else
            HEAD(4 * LANES);
#undef HEAD
    }
}

/* The gradients of `attend`. grad_sink: (sequences * heads,); the three gradients lie alike;
 * scratch: (5 * width + 2 * QUERIES, tokens rounded up to LANES). */
void attend_back(const struct heads *q, const struct heads *k, const struct heads *v,
                 const struct heads *out, const struct heads *g, const float *log_sum,
                 int64_t heads, int64_t tokens, int64_t width, float scale, const float *sink,
                 int64_t from, int64_t to, const struct heads *grad_q, const struct heads *grad_k,
                 const struct heads *grad_v, float *grad_sink, float *scratch) {
    for (int64_t n = from; n < to; n++) {
        const int64_t b = n / heads, h = n % heads;
        grad_sink[n] = 0;
#define HEAD(W)                                                                                    \
    attend_head_back(head_of(q, b, h), q->token, head_of(k, b, h), k->token, head_of(v, b, h),     \
                     v->token, head_of(out, b, h), out->token, head_of(g, b, h), g->token,         \
                     log_sum + n * tokens, tokens, W, scale, sink[h], head_of(grad_q, b, h),       \
                     head_of(grad_k, b, h), head_of(grad_v, b, h), grad_q->token, grad_sink + n,   \
                     scratch)
        if (width == LANES)
            HEAD(LANES);
        else if (width == 2 * LANES)
            HEAD(2 * LANES);
        else
            HEAD(4 * LANES);
#undef HEAD
    }
}
