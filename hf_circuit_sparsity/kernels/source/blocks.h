/* CircuitGPT's blocks as kernels are told of them, and what is computed on single rows. */

#pragma once
#include "lanes.h"

void abs_topk(const float *x, int64_t ld, int64_t rows, int64_t width, int64_t k, float *out,
              int64_t ld_out, uint8_t *mask);

/* A linear layer by the rows of its weight, (rows, width), and by its columns. By rows: row_starts,
 * (rows + 1,), and of every nonzero its column, in the order of the values. By columns: starts,
 * (width + 1,), and of every nonzero its row, and its place among the values.
 * bias: (rows,) or NULL. */
struct linear {
    const int32_t *row_starts, *columns, *starts, *rows_of, *place;
    const float *values, *bias;
    int64_t rows, width;
};

/* Norms' weights, (width,) or NULL; k of every AbsTopK, 0 where all is kept; sinks, (heads,) or
 * NULL; keys and values of the tokens before, see `sizes`. */
struct block {
    struct linear attention_in, attention_out, mlp_in, mlp_out;
    const float *norm_1, *norm_2, *position_norm_1, *position_norm_2, *sink;
    float *keys, *values;
    int64_t k_read, k_query, k_key, k_value, k_attended, k_after_attention;
    int64_t k_mlp_read, k_neuron, k_mlp, k_after_mlp;
};

/* Keys and values are (sequences, heads, room, head_width); `past` of room are filled. */
struct sizes {
    int64_t sequences, width, position_width, heads, head_width, neurons, past, room;
    int64_t relu, relu_residual;
};

/* Of each of `many` rows the k largest, in place; all where k is 0. */
static inline void keep_largest(float *x, int64_t ld, int64_t many, int64_t width, int64_t k) {
    if (k) abs_topk(x, ld, many, width, k, x, ld, 0);
}

static inline void rms_norm(const float *x, const float *weight, int64_t width, float eps,
                            float *out) {
    double squares = 0;
    for (int64_t j = 0; j < width; j++) squares += (double)x[j] * x[j];
    const float scale = (float)(1 / __builtin_sqrt(squares / (double)width + eps));
    for (int64_t j = 0; j < width; j++) out[j] = x[j] * scale * (weight ? weight[j] : 1.0f);
}

/* x P(X <= x) for a normal X, to a few units in the last place: the complementary error function
 * by the fit of Press et al., Numerical Recipes, section 6.2, whose relative error is 1.2e-7. */
static inline vec gelu_of(vec x) {
    const vec z = where(x < 0, (vec){0} - x, x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
    vec p = t * 0.17087277f - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const vec rest = t * exponential(p - z * z); /* 1 - erf(z) */
    return x * 0.5f * where(x < 0, rest, 2.0f - rest);
}

static inline void gelu(float *x, int64_t n) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store(x + j, gelu_of(load(x + j)));
    float rest[LANES] = {0};
    memcpy(rest, x + j, 4 * (n - j));
    store(rest, gelu_of(load(rest)));
    memcpy(x + j, rest, 4 * (n - j));
}

static inline void rectify(float *x, int64_t n) {
    for (int64_t j = 0; j < n; j++) x[j] = x[j] < 0 ? 0 : x[j];
}
