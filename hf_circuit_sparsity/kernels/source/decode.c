#include "blocks.h"

/* ---------------------------------------------------------------- one token through all blocks
 *
 * CircuitGPT's blocks on one new token of each sequence: norms, sparse products, AbsTopK and
 * attention to the keys and values that are kept. All of it is in the cache of one core, and what a
 * call from Python costs exceeds what most of these steps take; so they are one call.
 */

/* Columns of channels that are zero, most of them, are passed over. */
static void multiply(const struct linear *w, const float *x, float *y) {
    if (w->bias)
        memcpy(y, w->bias, 4 * w->rows);
    else
        memset(y, 0, 4 * w->rows);
    for (int64_t j = 0; j < w->width; j++) {
        const float by = x[j];
        if (by == 0) continue;
        for (int32_t n = w->starts[j]; n < w->starts[j + 1]; n++)
            y[w->rows_of[n]] += by * w->values[w->place[n]];
    }
}

/* Attention of one head's query to `tokens` keys; seen: (tokens,) bytes, 0 for padding, or NULL.
 * scores: (tokens rounded up to LANES,) scratch. A query that sees nothing gives zeros. */
static void attend_to(const float *query, const float *keys, const float *values, int64_t tokens,
                      int64_t width, float scale, const float *sink, const uint8_t *seen,
                      float *scores, float *out) {
    for (int64_t t = 0; t < tokens; t += LANES) {
        const int many = t + LANES < tokens ? LANES : (int)(tokens - t);
        vec s[LANES] = {{0}};
        for (int i = 0; i < many; i++)
            for (int64_t c = 0; c < width; c += LANES)
                s[i] += load(query + c) * load(keys + (t + i) * width + c);
        store(scores + t, sums_of(s) * scale);
        for (int i = 0; i < LANES; i++)
            if (i >= many || (seen && !seen[t + i])) scores[t + i] = -1e30f;
    }
    vec top = (vec){0} + (sink ? *sink : -1e30f);
    for (int64_t t = 0; t < tokens; t += LANES) {
        const vec s = load(scores + t);
        top = where(s > top, s, top);
    }
    const float most = largest(top);
    const float of_sink = sink ? exponential((vec){0} + (*sink - most))[0] : 0;
    const float all = exponentials(scores, tokens, most) + of_sink;
    for (int64_t c = 0; c < width; c += LANES) {
        vec mixed = {0}, other = {0};
        int64_t t = 0;
        for (; t + 1 < tokens; t += 2) {
            mixed += scores[t] * load(values + t * width + c);
            other += scores[t + 1] * load(values + (t + 1) * width + c);
        }
        if (t < tokens) mixed += scores[t] * load(values + t * width + c);
        store(out + c, (mixed + other) / all);
    }
}

/* All blocks on one token of every sequence. x: (sequences, width), overwritten; positions:
 * (sequences, position_width), or NULL; seen: (sequences, past + 1) bytes, or NULL. The new keys and
 * values are written behind the past ones, so room > past.
 * scratch: 2 (width + position_width) + 4 heads head_width + neurons + room + LANES floats. */
void decode(const struct block *blocks, int64_t n_blocks, const struct sizes *z, float eps,
            float scale, float *x, const float *positions, const uint8_t *seen, float *scratch) {
    const int64_t inner = z->heads * z->head_width, all = z->width + z->position_width;
    float *read = scratch, *written = read + all, *qkv = written + all;
    float *attended = qkv + 3 * inner, *neurons = attended + inner, *scores = neurons + z->neurons;
    for (const struct block *b = blocks; b < blocks + n_blocks; b++)
        for (int64_t s = 0; s < z->sequences; s++) {
            float *stream = x + s * z->width;
            const float *position = positions ? positions + s * z->position_width : 0;
            rms_norm(stream, b->norm_1, z->width, eps, read);
            if (position)
                rms_norm(position, b->position_norm_1, z->position_width, eps, read + z->width);
            keep_largest(read, all, 1, all, b->k_read);
            multiply(&b->attention_in, read, qkv);
            keep_largest(qkv, inner, 1, inner, b->k_query);
            keep_largest(qkv + inner, inner, 1, inner, b->k_key);
            keep_largest(qkv + 2 * inner, inner, 1, inner, b->k_value);
            for (int64_t h = 0; h < z->heads; h++) {
                const int64_t width = z->head_width, head = (s * z->heads + h) * z->room * width;
                float *keys = b->keys + head, *values = b->values + head;
                memcpy(keys + z->past * width, qkv + inner + h * width, 4 * width);
                memcpy(values + z->past * width, qkv + 2 * inner + h * width, 4 * width);
                attend_to(qkv + h * width, keys, values, z->past + 1, width, scale,
                          b->sink ? b->sink + h : 0, seen ? seen + s * (z->past + 1) : 0, scores,
                          attended + h * width);
            }
            multiply(&b->attention_out, attended, written);
            keep_largest(written, z->width, 1, z->width, b->k_attended);
            for (int64_t j = 0; j < z->width; j++) stream[j] += written[j];
            if (z->relu_residual) rectify(stream, z->width);
            keep_largest(stream, z->width, 1, z->width, b->k_after_attention);

            rms_norm(stream, b->norm_2, z->width, eps, read);
            if (position)
                rms_norm(position, b->position_norm_2, z->position_width, eps, read + z->width);
            keep_largest(read, all, 1, all, b->k_mlp_read);
            multiply(&b->mlp_in, read, neurons);
            if (z->relu)
                rectify(neurons, z->neurons);
            else
                gelu(neurons, z->neurons);
            keep_largest(neurons, z->neurons, 1, z->neurons, b->k_neuron);
            multiply(&b->mlp_out, neurons, written);
            keep_largest(written, z->width, 1, z->width, b->k_mlp);
            for (int64_t j = 0; j < z->width; j++) stream[j] += written[j];
            if (z->relu_residual) rectify(stream, z->width);
            keep_largest(stream, z->width, 1, z->width, b->k_after_mlp);
        }
}
