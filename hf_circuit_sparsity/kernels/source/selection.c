#include "lanes.h"

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
 * out: (rows, width) the kept entries and zeros, or NULL; mask: (rows, width) bytes, or NULL.
 * Without a mask it may be done in place. */
void abs_topk(const float *x, int64_t ld, int64_t rows, int64_t width, int64_t k, float *out,
              int64_t ld_out, uint8_t *mask) {
    struct guess guess = {0x3f000000u, 0x3f800000u}; /* 0.5 and 1 */
    for (int64_t i = 0; i < rows; i++, x += ld) {
        const uint32_t *bits = (const uint32_t *)x;
        int64_t reaching;
        const uint32_t threshold = find_threshold(x, width, k, &guess, &reaching);
        if (out) {
            uint32_t *o = (uint32_t *)(out + i * ld_out);
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
            if (out) out[i * ld_out + j] = 0;
            if (mask) mask[i * width + j] = 0;
            reaching--;
        }
    }
}
SHARED(abs_topk, AT(0), a[1], a[2], a[3], a[4], AT(5), a[6], AT(7))

/* out = where(mask, grad, 0): the gradient of AbsTopK. */
void masked(const float *grad, const uint8_t *mask, int64_t n, float *out) {
    for (int64_t j = 0; j < n; j++) out[j] = mask[j] ? grad[j] : 0;
}
SHARED(masked, AT(0), AT(1), a[2], AT(3))

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
SHARED(zero_below, AT(0), a[1], (uint32_t)a[2])

/* ---------------------------------------------------------------- entries and bits
 *
 * What autograd keeps of a vector with many zeros: a bit for every entry, WORD of them to a word,
 * and the entries that have one.
 */

#define WORD 16

/* Takes the entries that are not 0, or with a mask, a byte each, those where it is not; returns how
 * many. bits: ceil(n / WORD) words; LANES places behind the values may be written. */
int64_t pack(const float *x, const uint8_t *mask, int64_t n, uint16_t *bits, float *values) {
    int64_t taken = 0;
    for (int64_t j = 0; j < n; j += WORD, bits++) {
        const int64_t size = j + WORD < n ? WORD : n - j;
        uint16_t word = 0;
#ifdef __AVX512BW__
        if (size == WORD) {
            const __m512 v = _mm512_loadu_ps(x + j);
            if (mask) {
                const __m128i bytes = _mm_loadu_si128((const void *)(mask + j));
                const __m512i wide = _mm512_cvtepu8_epi32(bytes);
                word = _mm512_test_epi32_mask(wide, wide);
            } else {
                word = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            }
            _mm512_storeu_ps(values + taken, _mm512_maskz_compress_ps(word, v));
            taken += __builtin_popcount(word);
            *bits = word;
            continue;
        }
#endif
        for (int64_t lane = 0; lane < size; lane++) {
            const int take = mask ? mask[j + lane] != 0 : x[j + lane] != 0;
            values[taken] = x[j + lane];
            word |= (uint16_t)(take << lane);
            taken += take;
        }
        *bits = word;
    }
    return taken;
}

/* Puts the values back to where the bits are, and 0 elsewhere. Returns how many there were. */
int64_t unpack(const uint16_t *bits, const float *values, int64_t n, float *x) {
    int64_t taken = 0;
    for (int64_t j = 0; j < n; j += WORD, bits++) {
        const int64_t size = j + WORD < n ? WORD : n - j;
#ifdef __AVX512F__
        if (size == WORD) { /* reads nothing beyond what it puts back */
            _mm512_storeu_ps(x + j, _mm512_maskz_expandloadu_ps(*bits, values + taken));
            taken += __builtin_popcount(*bits);
            continue;
        }
#endif
        for (int64_t lane = 0; lane < size; lane++) {
            const int take = *bits >> lane & 1;
            x[j + lane] = take ? values[taken] : 0;
            taken += take;
        }
    }
    return taken;
}
