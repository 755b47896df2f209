// libcublasLt.so.13 of the stub: products are counted and not computed.

#include "stub.h"

// sizeof(cublasLtMatmulHeuristicResult_t) of cublasLt.h: an algorithm of 64 bytes, a size of the workspace, a status,
// the number of waves and four reserved integers.
enum { HEURISTIC_BYTES = 96 };

CREATES(cublasLtCreate)
CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatmulPreferenceCreate)
CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatrixTransformDescCreate)

int cublasLtMatmul(void *handle, void *product, void *alpha, void *a, void *a_layout, void *b, void *b_layout,
                   void *beta, void *c, void *c_layout, void *d, void *d_layout, void *algorithm, void *workspace,
                   size_t workspace_bytes, struct stream *stream) {
    count_work(stream, PRODUCTS);
    return 0;
}

int cublasLtMatrixTransform(void *handle, void *transform, void *alpha, void *a, void *a_layout, void *beta, void *b,
                            void *b_layout, void *c, void *c_layout, struct stream *stream) {
    count_work(stream, LAUNCHES);
    return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, char *results, int *returned) {
    *returned = requested > 0;
    if (requested > 0) memset(results, 0, HEURISTIC_BYTES);
    return 0;
}

SUCCEEDS(cublasLtDestroy)
SUCCEEDS(cublasLtMatmulAlgoConfigSetAttribute)
SUCCEEDS(cublasLtMatmulAlgoInit)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatrixTransformDescDestroy)
