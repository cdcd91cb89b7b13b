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
