#include "lanes.h"

/* ---------------------------------------------------------------- causal attention with a sink
 *
 * One sequence and head at a time, whose keys and values then lie in the first cache. LANES queries
 * are taken at once, one in every lane: a score is then a vector, the softmax needs no sum across
 * lanes, and what is read of a key or value is read once for all of them. That three quarters of
 * all channels are zero is left unused: lists of the others would save a quarter of the time at
 * best, before they are made (benchmarks/results/sparse_execution.md).
 * Matrices of a head are (tokens, channels); see `struct heads` for where they are.
 */

#define FAR -1e30f /* the score of a key that comes after the query; exp of it is 0 */
#define TOGETHER (LANES < 8 ? LANES : 8) /* vectors of sums that are kept in registers */

/* Where the matrices of sequences and heads begin, and how far apart tokens are. */
struct heads {
    float *data;
    int64_t sequence, head, token;
};

static inline float *head_of(const struct heads *h, int64_t sequence, int64_t head) {
    return h->data + sequence * h->sequence + head * h->head;
}

/* The matrix of a head as one piece, zeros behind it: rows at the distance of tokens would share
 * cache sets. */
static inline void gather(const float *from, int64_t ld, int64_t tokens, int64_t padded, int width,
                          float *to) {
    for (int64_t t = 0; t < tokens; t++) memcpy(to + t * width, from + t * ld, 4 * width);
    memset(to + tokens * width, 0, 4 * width * (padded - tokens));
}

/* LANES tokens turned to (channels, tokens); zeros where there are fewer. */
static inline void turn_tokens(const float *from, int64_t ld, int64_t size, int width, float *to) {
    if (size < LANES) memset(to, 0, 4 * width * LANES);
    turn(from, ld, size, width, to, LANES);
}

/* Products with TOGETHER rows, from number `j`, of LANES tokens that are turned. */
static inline void products_of(const float *turned, const float *rows, int64_t j, const int width,
                               vec *s) {
    for (int n = 0; n < TOGETHER; n++) s[n] = (vec){0};
    for (int c = 0; c < width; c++) {
        const vec token = load(turned + c * LANES);
        for (int n = 0; n < TOGETHER; n++) s[n] += rows[(j + n) * width + c] * token;
    }
}

/* Where the key is none that comes after the query of the lane. */
static inline ivec is_seen(int64_t key, int64_t first) {
    const ivec lane = {COUNT_UP};
    return lane >= (int32_t)(key - first);
}

/* Sums of the rows up to `seen`, weighted: weights are (rows, LANES), sums (channels, LANES). */
static inline void mix(const float *weights, const float *rows, int64_t seen, const int width,
                       float *sums) {
    for (int c = 0; c < width; c += TOGETHER) {
        vec s[TOGETHER] = {{0}};
        for (int64_t j = 0; j < seen; j++) {
            const vec weight = load(weights + j * LANES);
            for (int n = 0; n < TOGETHER; n++) s[n] += rows[j * width + c + n] * weight;
        }
        for (int n = 0; n < TOGETHER; n++) store(sums + (c + n) * LANES, s[n]);
    }
}

/* Adds to each row up to `seen` the LANES tokens, (LANES, width), weighted. */
static inline void spread(const float *weights, const float *tokens, int64_t seen, const int width,
                          float *rows) {
    for (int n = 0; n < width; n += LANES)
        for (int a = 0; a < LANES; a += TOGETHER) {
            vec token[TOGETHER];
            for (int m = 0; m < TOGETHER; m++) token[m] = load(tokens + (a + m) * width + n);
            for (int64_t j = 0; j < seen; j++) {
                vec s = load(rows + j * width + n), other = {0};
                for (int m = 0; m < TOGETHER; m += 2) {
                    s += weights[j * LANES + a + m] * token[m];
                    other += weights[j * LANES + a + m + 1] * token[m + 1];
                }
                store(rows + j * width + n, s + other);
            }
        }
}

static inline __attribute__((always_inline)) void attend_head(
    const float *q, int64_t ld_q, const float *k, int64_t ld_k, const float *v, int64_t ld_v,
    int64_t tokens, const int width, float scale, float sink, float *out, int64_t ld_out,
    float *tops, float *sums, float *scratch) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    float *keys = scratch, *values = keys + width * padded, *weights = values + width * padded;
    float *turned = weights + LANES * padded, *mixed = turned + LANES * width;
    gather(k, ld_k, tokens, padded, width, keys);
    gather(v, ld_v, tokens, padded, width, values);
    for (int64_t first = 0; first < tokens; first += LANES) {
        const int64_t size = first + LANES < tokens ? LANES : tokens - first, seen = first + LANES;
        turn_tokens(q + first * ld_q, ld_q, size, width, turned);
        vec top = (vec){0} + sink;
        for (int64_t j = 0; j < seen; j += TOGETHER) {
            vec s[TOGETHER];
            products_of(turned, keys, j, width, s);
            for (int n = 0; n < TOGETHER; n++) {
                s[n] *= scale;
                if (j >= first) s[n] = where(is_seen(j + n, first), s[n], (vec){0} + FAR);
                store(weights + (j + n) * LANES, s[n]);
                top = where(s[n] > top, s[n], top);
            }
        }
        vec all = exponential(sink - top);
        for (int64_t j = 0; j < seen; j++) {
            const vec e = exponential(load(weights + j * LANES) - top);
            store(weights + j * LANES, e);
            all += e;
        }
        memcpy(tops + first, &top, 4 * size), memcpy(sums + first, &all, 4 * size);
        mix(weights, values, seen, width, mixed);
        const vec share = 1.0f / all;
        for (int c = 0; c < width; c++) store(mixed + c * LANES, load(mixed + c * LANES) * share);
        turn(mixed, LANES, width, size, out + first * ld_out, ld_out);
    }
}

static inline __attribute__((always_inline)) void attend_head_back(
    const float *q, int64_t ld_q, const float *k, int64_t ld_k, const float *v, int64_t ld_v,
    const float *out, int64_t ld_out, const float *g, int64_t ld_g, const float *log_sum,
    int64_t tokens, const int width, float scale, float sink, float *grad_q, float *grad_k,
    float *grad_v, int64_t ld_grad, float *grad_sink, float *scratch) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    float *keys = scratch, *values = keys + width * padded;
    float *of_k = values + width * padded, *of_v = of_k + width * padded;
    float *weights = of_v + width * padded, *slopes = weights + LANES * padded;
    float *queries = slopes + LANES * padded, *turned_q = queries + LANES * width;
    float *ups = turned_q + LANES * width, *turned_g = ups + LANES * width;
    gather(k, ld_k, tokens, padded, width, keys);
    gather(v, ld_v, tokens, padded, width, values);
    memset(of_k, 0, 8 * width * padded); /* of_v too */
    for (int64_t first = 0; first < tokens; first += LANES) {
        const int64_t size = first + LANES < tokens ? LANES : tokens - first, seen = first + LANES;
        gather(q + first * ld_q, ld_q, size, LANES, width, queries);
        gather(g + first * ld_g, ld_g, size, LANES, width, ups);
        turn(queries, width, LANES, width, turned_q, LANES);
        turn(ups, width, LANES, width, turned_g, LANES);
        float delta_of[LANES] = {0}, log_of[LANES] = {0};
        for (int a = 0; a < size; a++) {
            vec through = {0};
            for (int n = 0; n < width; n += LANES)
                through += load(ups + a * width + n) * load(out + (first + a) * ld_out + n);
            delta_of[a] = total(through);
            log_of[a] = log_sum[first + a];
        }
        const vec delta = load(delta_of), logs = load(log_of);
        *grad_sink -= total(exponential(sink - logs) * delta);
        for (int64_t j = 0; j < seen; j += TOGETHER) {
            vec s[TOGETHER], dp[TOGETHER];
            products_of(turned_q, keys, j, width, s);
            products_of(turned_g, values, j, width, dp);
            for (int n = 0; n < TOGETHER; n++) {
                vec e = exponential(s[n] * scale - logs);
                if (j >= first) e = where(is_seen(j + n, first), e, (vec){0});
                store(weights + (j + n) * LANES, e);
                store(slopes + (j + n) * LANES, e * (dp[n] - delta) * scale);
            }
        }
        spread(slopes, queries, seen, width, of_k);
        spread(weights, ups, seen, width, of_v);
        mix(slopes, keys, seen, width, turned_q);
        turn(turned_q, LANES, width, size, grad_q + first * ld_grad, ld_grad);
    }
    for (int64_t t = 0; t < tokens; t++) {
        memcpy(grad_k + t * ld_grad, of_k + t * width, 4 * width);
        memcpy(grad_v + t * ld_grad, of_v + t * width, 4 * width);
    }
}

/* Heads [from, to) of all sequences' heads. width: channels of a head: 16, 32 or 64.
 * sink: (heads,); tops and sums: (sequences * heads, tokens), the largest score, the sink counted,
 * and the softmax denominator after it was taken off.
 * scratch: (2 * width + LANES) * tokens rounded up to LANES + 2 * width * LANES. */
void attend(const struct heads *q, const struct heads *k, const struct heads *v, int64_t heads,
            int64_t tokens, int64_t width, float scale, const float *sink, int64_t from, int64_t to,
            const struct heads *out, float *tops, float *sums, float *scratch) {
    for (int64_t n = from; n < to; n++) {
        const int64_t b = n / heads, h = n % heads;
#define HEAD(W)                                                                                    \
    attend_head(head_of(q, b, h), q->token, head_of(k, b, h), k->token, head_of(v, b, h),          \
                v->token, tokens, W, scale, sink[h], head_of(out, b, h), out->token,               \
                tops + n * tokens, sums + n * tokens, scratch)
        if (width == 16)
            HEAD(16);
        else if (width == 32)
            HEAD(32);
        else
            HEAD(64);
#undef HEAD
    }
}
SHARED(attend, AT(0), AT(1), AT(2), a[3], a[4], a[5], float_of(a[6]), AT(7), a[8], a[9], AT(10), AT(11),
       AT(12), AT(13))

/* The gradients of `attend`. log_sum: of the denominator with the sink; grad_sink: (sequences * heads,); the three gradients lie alike;
 * scratch: (4 * width + 2 * LANES) * tokens rounded up to LANES + 4 * width * LANES. */
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
        if (width == 16)
            HEAD(16);
        else if (width == 32)
            HEAD(32);
        else
            HEAD(64);
#undef HEAD
    }
}
SHARED(attend_back, AT(0), AT(1), AT(2), AT(3), AT(4), AT(5), a[6], a[7], a[8], float_of(a[9]), AT(10),
       a[11], a[12], AT(13), AT(14), AT(15), AT(16), AT(17))
