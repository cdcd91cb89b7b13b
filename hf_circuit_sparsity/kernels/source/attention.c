#include "lanes.h"

/* ---------------------------------------------------------------- causal attention with a sink
 *
 * One sequence and head at a time, whose keys and values then lie in the first cache. Scores of a
 * query are computed for LANES keys at once, from keys of which LANES at a time are turned to
 * (channels, keys), and from those channels of the query alone that are not zero: AbsTopK leaves a
 * few. Values are mixed for QUERIES queries at once, which share what is read of them.
 * Matrices of a head are (tokens, channels); see `struct heads` for where they are.
 */

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

/* The channels of a query that are not zero, times the scale. */
struct nonzeros {
    int many;
    int32_t channels[5 * LANES];
    float values[5 * LANES];
};

static inline void list_nonzeros_of(const float *query, int width, float scale,
                                    struct nonzeros *list) {
    list->many = 0;
#ifdef __AVX512F__
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int c = 0; c < width; c += LANES) {
        const vec x = load(query + c);
        const __mmask16 kept =
            _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(c));
        _mm512_storeu_ps(list->values + list->many,
                         _mm512_maskz_compress_ps(kept, (__m512)(x * scale)));
        _mm512_storeu_si512(list->channels + list->many, _mm512_maskz_compress_epi32(kept, at));
        list->many += __builtin_popcount(kept);
    }
    return;
#endif
    for (int c = 0; c < width; c++) {
        list->channels[list->many] = c;
        list->values[list->many] = query[c] * scale;
        list->many += query[c] != 0;
    }
}

/* As `scores`, of LANES keys that are turned, the first of them number `first`. */
static inline vec sparse_scores(const struct nonzeros *query, const float *keys, int64_t first,
                                int64_t i) {
    vec even = {0}, odd = {0};
    int n = 0;
    for (; n + 1 < query->many; n += 2) {
        even += query->values[n] * load(keys + query->channels[n] * LANES);
        odd += query->values[n + 1] * load(keys + query->channels[n + 1] * LANES);
    }
    if (n < query->many) even += query->values[n] * load(keys + query->channels[n] * LANES);
    const vec s = even + odd;
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
    for (int64_t first = 0; first < tokens; first += QUERIES) {
        const int64_t seen = first + QUERIES < tokens ? first + QUERIES : tokens;
        float all[QUERIES];
        for (int a = 0; a < QUERIES; a++) {
            /* Behind the last token its query is taken again, and not written. */
            const int64_t i = first + a < tokens ? first + a : tokens - 1;
            float *row = weights + a * padded;
            struct nonzeros query;
            list_nonzeros_of(q + i * ld_q, width, scale, &query);
            vec top = (vec){0} + sink;
            for (int64_t j = 0; j < seen; j += LANES) {
                const vec s = sparse_scores(&query, turned + j * width, j, i);
                store(row + j, s);
                top = where(s > top, s, top);
            }
            const float most = largest(top);
            all[a] = exponentials(row, seen, most) + exponential((vec){0} + (sink - most))[0];
            log_sum[i] = most + __builtin_logf(all[a]);
        }
        for (int n = 0; n < width / LANES; n++) {
            vec mixed[QUERIES] = {{0}};
            for (int64_t j = 0; j < seen; j++) {
                const vec value = load(values + j * width + n * LANES);
                for (int a = 0; a < QUERIES; a++) mixed[a] += weights[a * padded + j] * value;
            }
            for (int a = 0; a < QUERIES && first + a < tokens; a++)
                store(out + (first + a) * ld_out + n * LANES, mixed[a] / all[a]);
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
 * scratch: (2 * width + QUERIES, tokens rounded up to LANES). */
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
SHARED(attend, AT(0), AT(1), AT(2), a[3], a[4], a[5], float_of(a[6]), AT(7), a[8], a[9], AT(10), AT(11),
       AT(12))

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
SHARED(attend_back, AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), a[6], a[7], a[8], float_of(a[9]), AT(10),
       a[11], a[12], AT(13), AT(14), AT(15), AT(16), AT(17))
