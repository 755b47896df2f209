// libcudart.so.13 of the stub: memory, copies, streams, graphs and kernels that do nothing.

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <time.h>

#include "stub.h"

enum { PAGE = 4096, MOST_ALLOCATIONS = 1 << 16, MOST_CAPABILITIES = 256 };
enum memory { HOST_MEMORY = 1, DEVICE_MEMORY = 2 };                            // enum cudaMemoryType
enum { TO_DEVICE_KIND = 1, TO_HOST_KIND = 2, ON_DEVICE_KIND = 3, ANY_KIND = 4 };  // enum cudaMemcpyKind
enum { RELAXED_CAPTURE = 2 };                                                  // enum cudaStreamCaptureMode
enum { IS_CAPTURING = 1, IS_INVALIDATED = 2 };                                 // enum cudaStreamCaptureStatus

typedef struct {
    unsigned x, y, z;
} dim3;

// ---- Errors ----

static _Thread_local int last_error;
static _Thread_local int current_device;

static int fail(int code) {
    if (code != SUCCESS) last_error = code;
    return code;
}

// The real runtime opens the driver at its first call; without one, or with an older one, every call fails.
static int driver_version(void) {
    static void *driver;
    if (!driver) driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
    return driver ? (int)setting("CUDA_STUB_DRIVER", RUNTIME_VERSION) : 0;
}

static int driver_error(void) {
    if (driver_version() < RUNTIME_VERSION) return INSUFFICIENT_DRIVER;
    int devices[MOST_DEVICES];
    int64_t stated = setting("CUDA_STUB_INIT", SUCCESS);
    return stated ? (int)stated : visible_devices(devices) ? SUCCESS : NO_DEVICE;
}

#define NEEDS_DEVICE()                            \
    do {                                          \
        int code = driver_error();                \
        if (code != SUCCESS) return fail(code);   \
    } while (0)

const char *cudaGetErrorString(int code) { return error_text(code); }

const char *cudaGetErrorName(int code) {
    switch (code) {
        case SUCCESS: return "cudaSuccess";
        case INVALID_VALUE: return "cudaErrorInvalidValue";
        case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
        case INSUFFICIENT_DRIVER: return "cudaErrorInsufficientDriver";
        case NO_DEVICE: return "cudaErrorNoDevice";
        case INVALID_DEVICE: return "cudaErrorInvalidDevice";
        case NO_KERNEL_IMAGE: return "cudaErrorNoKernelImageForDevice";
        case NOT_FOUND: return "cudaErrorSymbolNotFound";
        case 803: return "cudaErrorSystemDriverMismatch";
        case CAPTURE_UNSUPPORTED: return "cudaErrorStreamCaptureUnsupported";
        case CAPTURE_INVALIDATED: return "cudaErrorStreamCaptureInvalidated";
        default: return "unrecognized error code";
    }
}

int cudaPeekAtLastError(void) { return last_error; }

int cudaGetLastError(void) {
    int code = last_error;
    last_error = SUCCESS;
    return code;
}

#include "devices.h"

// ---- Capture of graphs ----

static struct stream *captured;
static int capture_mode;

// Whether a call must fail because a stream is being captured, which ends that capture as it does on a GPU.
static int forbidden(const struct stream *waited_for) {
    if (!captured) return 0;
    int unsafe = waited_for ? captured == waited_for : capture_mode != RELAXED_CAPTURE;
    if (unsafe) captured->invalidated = 1;
    return unsafe;
}

#define NOT_DURING_CAPTURE(stream) \
    if (forbidden(stream)) return fail(CAPTURE_UNSUPPORTED)

int cudaStreamBeginCapture(struct stream *stream, int mode) {
    if ((uintptr_t)stream <= 2 || captured) return fail(CAPTURE_UNSUPPORTED);
    captured = stream;
    capture_mode = mode;
    stream->capturing = 1;
    stream->invalidated = 0;
    return SUCCESS;
}

int cudaStreamEndCapture(struct stream *stream, void **graph) {
    *graph = NULL;
    if (!is_capturing(stream)) return fail(INVALID_VALUE);
    captured = NULL;
    stream->capturing = 0;
    if (stream->invalidated) return fail(CAPTURE_INVALIDATED);
    *graph = malloc(1);
    return SUCCESS;
}

int cudaStreamIsCapturing(struct stream *stream, int *status) {
    *status = !is_capturing(stream) ? 0 : stream->invalidated ? IS_INVALIDATED : IS_CAPTURING;
    return SUCCESS;
}

int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) {
    if (!graph) return fail(INVALID_VALUE);
    *executable = malloc(1);
    return SUCCESS;
}

int cudaGraphLaunch(void *executable, struct stream *stream) {
    count(GRAPHS, 1);
    return SUCCESS;
}

int cudaGraphDestroy(void *graph) {
    free(graph);
    return SUCCESS;
}

int cudaGraphExecDestroy(void *executable) {
    free(executable);
    return SUCCESS;
}

#include "memory.h"

// ---- Streams and events ----

int cudaStreamCreateWithFlags(struct stream **stream, unsigned flags) {
    NEEDS_DEVICE();
    *stream = calloc(1, sizeof(**stream));
    return SUCCESS;
}

int cudaStreamCreate(struct stream **stream) { return cudaStreamCreateWithFlags(stream, 0); }

int cudaStreamDestroy(struct stream *stream) {
    free(stream);
    return SUCCESS;
}

int cudaStreamSynchronize(struct stream *stream) {
    NEEDS_DEVICE();
    NOT_DURING_CAPTURE(stream);
    count(SYNCS, 1);
    return SUCCESS;
}

int cudaStreamQuery(struct stream *stream) {
    NOT_DURING_CAPTURE(stream);
    return SUCCESS;
}

int cudaDeviceSynchronize(void) {
    NEEDS_DEVICE();
    if (captured) return captured->invalidated = 1, fail(CAPTURE_UNSUPPORTED);
    count(SYNCS, 1);
    return SUCCESS;
}

// Calls the function at once, since everything before it on the stream is done.
int cudaLaunchHostFunc(struct stream *stream, void (*function)(void *), void *data) {
    if (!is_capturing(stream)) function(data);
    return SUCCESS;
}

SUCCEEDS(cudaStreamWaitEvent)

int cudaEventCreateWithFlags(struct timespec **event, unsigned flags) {
    NEEDS_DEVICE();
    *event = calloc(1, sizeof(**event));
    return SUCCESS;
}

int cudaEventCreate(struct timespec **event) { return cudaEventCreateWithFlags(event, 0); }

int cudaEventRecord(struct timespec *event, struct stream *stream) {
    clock_gettime(CLOCK_MONOTONIC, event);
    return SUCCESS;
}

int cudaEventRecordWithFlags(struct timespec *event, struct stream *stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

int cudaEventElapsedTime(float *milliseconds, const struct timespec *start, const struct timespec *end) {
    *milliseconds = (end->tv_sec - start->tv_sec) * 1e3f + (end->tv_nsec - start->tv_nsec) * 1e-6f;
    return SUCCESS;
}

int cudaEventSynchronize(struct timespec *event) {
    NOT_DURING_CAPTURE(NULL);
    count(SYNCS, 1);
    return SUCCESS;
}

int cudaEventDestroy(struct timespec *event) {
    free(event);
    return SUCCESS;
}

SUCCEEDS(cudaEventQuery)

#include "kernels.h"
