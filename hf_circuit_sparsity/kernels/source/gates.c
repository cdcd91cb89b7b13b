#include "lanes.h"

/* ---------------------------------------------------------------- gates on nodes
 *
 * out = center + gate * x for every row of x, (rows, width), and its gradients in one pass. The sums
 * over rows are of the rows that are passed: callers cut them the same way whatever the threads.
 */

#define WIDE 4

void gate_rows(const float *x, int64_t rows, int64_t width, const float *gate, const float *center,
               float *out) {
    for (int64_t i = 0; i < rows; i++, x += width, out += width) {
        int64_t j = 0;
        for (; j + LANES <= width; j += LANES)
            store(out + j, load(center + j) + load(gate + j) * load(x + j));
        for (; j < width; j++) out[j] = center[j] + gate[j] * x[j];
    }
}
SHARED(gate_rows, AT(0), a[1], a[2], AT(3), AT(4), AT(5))

/* dx = gate * grad; sums: (2, width), over rows of grad * x and of grad. */
void gate_gradients(const float *grad, const float *x, int64_t rows, int64_t width,
                    const float *gate, float *dx, float *sums) {
    int64_t first = 0;
    for (; first + WIDE * LANES <= width; first += WIDE * LANES) {
        vec products[WIDE] = {0}, totals[WIDE] = {0};
        for (int64_t i = 0; i < rows; i++)
            for (int v = 0; v < WIDE; v++) {
                const int64_t at = i * width + first + v * LANES;
                const vec g = load(grad + at);
                products[v] += g * load(x + at);
                totals[v] += g;
                store(dx + at, g * load(gate + first + v * LANES));
            }
        for (int v = 0; v < WIDE; v++) {
            store(sums + first + v * LANES, products[v]);
            store(sums + width + first + v * LANES, totals[v]);
        }
    }
    for (int64_t j = first; j < width; j++) {
        float product = 0, total = 0;
        for (int64_t i = 0; i < rows; i++) {
            const float g = grad[i * width + j];
            product += g * x[i * width + j];
            total += g;
            dx[i * width + j] = g * gate[j];
        }
        sums[j] = product;
        sums[width + j] = total;
    }
}
SHARED(gate_gradients, AT(0), AT(1), a[2], a[3], AT(4), AT(5), AT(6))
