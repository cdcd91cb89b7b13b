#include "lanes.h"

/* ---------------------------------------------------------------- pieces, shared among threads
 *
 * By the OpenMP that torch computes with, whose entry point the caller passes: its threads are awake
 * after torch's last operation, and others beside them would wait for a core on which these spin.
 */

typedef void parallel_region(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct work {
    void (*kernel)(int64_t *arguments);
    int64_t *arguments, pieces, width;
    int64_t next;
};

/* Takes pieces until none is left. */
static void take(void *data) {
    struct work *w = data;
    for (;;) {
        const int64_t i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
        if (i >= w->pieces) return;
        w->kernel(w->arguments + i * w->width);
    }
}

/* Calls the kernel for every piece; arguments: (pieces, width), as its wrapper SHARED has them.
 * parallel: of OpenMP, or NULL for one thread. */
void share(void (*kernel)(int64_t *), int64_t *arguments, int64_t pieces, int64_t width,
           parallel_region *parallel, int64_t threads) {
    struct work w = {kernel, arguments, pieces, width, 0};
    if (parallel && threads > 1)
        parallel(take, &w, (unsigned)threads, 0);
    else
        take(&w);
}
