// libcublas.so.13 of the stub: products are counted and not computed.

#include "stub.h"

struct handle {
    struct stream *stream;
};

#define MULTIPLIES(name)                           \
    int name(struct handle *handle) {              \
        count_work(handle->stream, PRODUCTS);      \
        return 0;                                  \
    }

CREATES(cublasCreate_v2)

int cublasDestroy_v2(struct handle *handle) {
    free(handle);
    return 0;
}

int cublasSetStream_v2(struct handle *handle, struct stream *stream) {
    handle->stream = stream;
    return 0;
}

int cublasGetMathMode(struct handle *handle, int *mode) {
    (void)handle;
    *mode = 0;
    return 0;
}

const char *cublasGetStatusName(int code) { return code ? "CUBLAS_STATUS_INTERNAL_ERROR" : "CUBLAS_STATUS_SUCCESS"; }

const char *cublasGetStatusString(int code) { return code ? "an internal operation failed" : "success"; }

SUCCEEDS(cublasSetMathMode)
MULTIPLIES(cublasSgemm_v2)
MULTIPLIES(cublasDgemm_v2)
MULTIPLIES(cublasGemmEx)
MULTIPLIES(cublasGemmBatchedEx)
MULTIPLIES(cublasGemmStridedBatchedEx)
MULTIPLIES(cublasSgemmBatched)
MULTIPLIES(cublasDgemmBatched)
MULTIPLIES(cublasSgemmStridedBatched)
MULTIPLIES(cublasDgemmStridedBatched)
MULTIPLIES(cublasSgeam)
MULTIPLIES(cublasDgeam)
MULTIPLIES(cublasSgetrfBatched)
MULTIPLIES(cublasDgetrfBatched)
MULTIPLIES(cublasSgetriBatched)
MULTIPLIES(cublasDgetriBatched)
MULTIPLIES(cublasScopy_v2)
MULTIPLIES(cublasSscal_v2)
