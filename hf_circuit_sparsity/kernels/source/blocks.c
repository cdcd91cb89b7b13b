#include "blocks.h"

/* ---------------------------------------------------------------- blocks on many tokens
 *
 * What CircuitGPT's blocks do between two attentions, for CHUNK tokens from beginning to end before
 * the next: so much stays in the second-level cache, where whole matrices of activations, several
 * for each layer, would be written to memory and read again. Attention itself is in attention.c.
 */

#define CHUNK (2 * LANES) /* as many as `sparse_linear` takes at once */

void sparse_linear(const int32_t *starts, const int32_t *columns, const float *values, int64_t rows,
                   int64_t width, const float *bias, const float *x, int64_t ld_x, int64_t from,
                   int64_t to, float *scratch, float *y, int64_t ld_y);

static void apply(const struct linear *w, const float *x, int64_t tokens, float *turned, float *y) {
    sparse_linear(w->row_starts, w->columns, w->values, w->rows, w->width, w->bias, x, w->width, 0,
                  tokens, turned, y, w->rows);
}

/* What a block reads of the stream: normed, positions behind it, the largest. */
static void read_stream(const struct sizes *z, float eps, const float *stream,
                        const float *positions, int64_t tokens, const float *norm,
                        const float *position_norm, int64_t k, float *read) {
    const int64_t all = z->width + z->position_width;
    for (int64_t t = 0; t < tokens; t++) {
        rms_norm(stream + t * z->width, norm, z->width, eps, read + t * all);
        if (positions)
            rms_norm(positions + t * z->position_width, position_norm, z->position_width, eps,
                     read + t * all + z->width);
    }
    keep_largest(read, all, tokens, all, k);
}

static void add(const struct sizes *z, const float *delta, int64_t tokens, int64_t k,
                float *stream) {
    for (int64_t j = 0; j < tokens * z->width; j++) stream[j] += delta[j];
    if (z->relu_residual) rectify(stream, tokens * z->width);
    keep_largest(stream, z->width, tokens, z->width, k);
}

/* Tokens [from, to) from after the attention of one block, `done`, to before that of the next; of the
 * first block and the last, the other one is NULL. stream: (tokens, width), changed in place;
 * attended: (tokens, heads head_width); positions: (tokens, position_width) or NULL;
 * qkv: (tokens, 3 heads head_width), written for `next`.
 * scratch: CHUNK times 2 (width + position_width) + neurons + LANES and the largest of neurons,
 * width + position_width and heads head_width. */
void between_attentions(const struct block *done, const struct block *next, const struct sizes *z,
                        float eps, const float *positions, const float *attended, int64_t from,
                        int64_t to, float *stream, float *qkv, float *scratch) {
    const int64_t inner = z->heads * z->head_width, all = z->width + z->position_width;
    float *read = scratch, *written = read + CHUNK * all, *neurons = written + CHUNK * all;
    float *turned = neurons + CHUNK * z->neurons;
    for (int64_t t = from; t < to; t += CHUNK) {
        const int64_t tokens = t + CHUNK < to ? CHUNK : to - t;
        float *own = stream + t * z->width;
        const float *position = positions ? positions + t * z->position_width : 0;
        if (done) {
            apply(&done->attention_out, attended + t * inner, tokens, turned, written);
            keep_largest(written, z->width, tokens, z->width, done->k_attended);
            add(z, written, tokens, done->k_after_attention, own);
            read_stream(z, eps, own, position, tokens, done->norm_2, done->position_norm_2,
                        done->k_mlp_read, read);
            apply(&done->mlp_in, read, tokens, turned, neurons);
            if (z->relu)
                rectify(neurons, tokens * z->neurons);
            else
                gelu(neurons, tokens * z->neurons);
            keep_largest(neurons, z->neurons, tokens, z->neurons, done->k_neuron);
            apply(&done->mlp_out, neurons, tokens, turned, written);
            keep_largest(written, z->width, tokens, z->width, done->k_mlp);
            add(z, written, tokens, done->k_after_mlp, own);
        }
        if (next) {
            float *parts = qkv + t * 3 * inner;
            read_stream(z, eps, own, position, tokens, next->norm_1, next->position_norm_1,
                        next->k_read, read);
            apply(&next->attention_in, read, tokens, turned, parts);
            keep_largest(parts, 3 * inner, tokens, inner, next->k_query);
            keep_largest(parts + inner, 3 * inner, tokens, inner, next->k_key);
            keep_largest(parts + 2 * inner, 3 * inner, tokens, inner, next->k_value);
        }
    }
}
SHARED(between_attentions, AT(0), AT(1), AT(2), float_of(a[3]), AT(4), AT(5), a[6], a[7], AT(8), AT(9),
       AT(10))
