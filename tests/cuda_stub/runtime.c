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

// ---- Devices ----

// The beginning of cudaDeviceProp of CUDA 13.0 (driver_types.h), with its names; textures and surfaces are left out
// by their size, and so is what follows `maxBlocksPerMultiProcessor`. The whole struct has 1008 bytes.
struct properties {
    char name[256];
    char uuid[16];
    char luid[8];
    unsigned luidDeviceNodeMask;
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalConstMem;
    int major, minor;
    size_t textureAlignment, texturePitchAlignment;
    int multiProcessorCount, integrated, canMapHostMemory;
    int textures_and_surfaces[39];
    size_t surfaceAlignment;
    int concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, tccDriver, asyncEngineCount;
    int unifiedAddressing, memoryBusWidth, l2CacheSize, persistingL2CacheMaxSize, maxThreadsPerMultiProcessor;
    int streamPrioritiesSupported, globalL1CacheSupported, localL1CacheSupported;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID, hostNativeAtomicSupported;
    int pageableMemoryAccess, concurrentManagedAccess, computePreemptionSupported;
    int canUseHostPointerForRegisteredMem, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int pageableMemoryAccessUsesHostPageTables, directManagedMemAccessFromHost, maxBlocksPerMultiProcessor;
};
enum { PROPERTIES_BYTES = 1008 };

// Offsets that a C compiler finds in driver_types.h of CUDA 13.0.
_Static_assert(offsetof(struct properties, totalGlobalMem) == 288, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, major) == 360, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, multiProcessorCount) == 384, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, surfaceAlignment) == 552, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, l2CacheSize) == 596, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, sharedMemPerMultiprocessor) == 624, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, sharedMemPerBlockOptin) == 672, "cudaDeviceProp");
_Static_assert(offsetof(struct properties, maxBlocksPerMultiProcessor) == 688, "cudaDeviceProp");

int cudaDriverGetVersion(int *version) {
    *version = driver_version();
    return SUCCESS;
}

int cudaRuntimeGetVersion(int *version) {
    *version = RUNTIME_VERSION;
    return SUCCESS;
}

int cudaGetDeviceCount(int *number) {
    int devices[MOST_DEVICES];
    *number = 0;
    NEEDS_DEVICE();
    *number = visible_devices(devices);
    return SUCCESS;
}

int cudaGetDevice(int *device) {
    NEEDS_DEVICE();
    *device = current_device;
    return SUCCESS;
}

static int installed(int device) {
    int devices[MOST_DEVICES];
    return device >= 0 && device < visible_devices(devices) ? devices[device] : -1;
}

int cudaSetDevice(int device) {
    NEEDS_DEVICE();
    if (installed(device) < 0) return fail(INVALID_DEVICE);
    current_device = device;
    return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    NEEDS_DEVICE();
    if (installed(device) < 0) return fail(INVALID_DEVICE);
    *value = attribute_of(installed(device), attribute);
    return SUCCESS;
}

int cudaGetDeviceProperties(struct properties *out, int visible) {
    NEEDS_DEVICE();
    int device = installed(visible);
    if (device < 0) return fail(INVALID_DEVICE);
    struct limits limits = limits_of(device);
    memset(out, 0, PROPERTIES_BYTES);
    name_of(device, out->name, sizeof(out->name));
    uuid_of(device, out->uuid);
    capability_of(device, &out->major, &out->minor);
    out->totalGlobalMem = memory_of_each();
    out->multiProcessorCount = limits.multiprocessors;
    out->maxThreadsPerMultiProcessor = limits.threads;
    out->maxBlocksPerMultiProcessor = limits.blocks;
    out->sharedMemPerMultiprocessor = (size_t)limits.shared;
    out->sharedMemPerBlockOptin = (size_t)limits.shared_optin;
    out->sharedMemPerBlock = (size_t)attribute_of(device, 8);
    out->totalConstMem = (size_t)attribute_of(device, 9);
    out->warpSize = attribute_of(device, 10);
    out->memPitch = (size_t)attribute_of(device, 11);
    out->regsPerBlock = out->regsPerMultiprocessor = attribute_of(device, 12);
    out->textureAlignment = out->texturePitchAlignment = out->surfaceAlignment = (size_t)attribute_of(device, 14);
    out->maxThreadsPerBlock = attribute_of(device, 1);
    for (int axis = 0; axis < 3; axis++) {
        out->maxThreadsDim[axis] = attribute_of(device, 2 + axis);
        out->maxGridSize[axis] = attribute_of(device, 5 + axis);
    }
    out->canMapHostMemory = out->concurrentKernels = out->unifiedAddressing = out->cooperativeLaunch = 1;
    out->pciBusID = bus_of(device);
    out->l2CacheSize = attribute_of(device, 38);
    out->asyncEngineCount = attribute_of(device, 40);
    return SUCCESS;
}

int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                     int *status) {
    NEEDS_DEVICE();
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (status) *status = *function == NULL;
    return *function ? SUCCESS : fail(NOT_FOUND);
}

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

// ---- Memory ----

static pthread_mutex_t allocations_lock = PTHREAD_MUTEX_INITIALIZER;
static struct allocation {
    char *start;
    size_t bytes;
    enum memory kind;
    int device;
} allocations[MOST_ALLOCATIONS];
static int allocations_end;
static size_t used[MOST_DEVICES];

static struct allocation *find_allocation(const void *pointer) {
    for (int i = 0; i < allocations_end; i++) {
        struct allocation *at = &allocations[i];
        if (at->start && (char *)pointer >= at->start && (char *)pointer < at->start + at->bytes) return at;
    }
    return NULL;
}

static int allocate(void **out, size_t bytes, enum memory kind) {
    NEEDS_DEVICE();
    *out = NULL;
    if (bytes == 0) return SUCCESS;
    size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&allocations_lock);
    int slot = 0, fits = kind != DEVICE_MEMORY || used[current_device] + rounded <= memory_of_each();
    while (slot < allocations_end && allocations[slot].start) slot++;
    void *start = MAP_FAILED;
    if (fits && slot < MOST_ALLOCATIONS)
        start = mmap(NULL, rounded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
        allocations[slot] = (struct allocation){start, rounded, kind, current_device};
        if (slot == allocations_end) allocations_end++;
        if (kind == DEVICE_MEMORY) {
            used[current_device] += rounded;
            int64_t now = count(ALLOCATED, (int64_t)rounded);
            if (now > counters[ALLOCATED_PEAK]) counters[ALLOCATED_PEAK] = now;
        }
        *out = start;
    }
    pthread_mutex_unlock(&allocations_lock);
    return start == MAP_FAILED ? fail(OUT_OF_MEMORY) : SUCCESS;
}

static int release(void *pointer) {
    if (!pointer) return SUCCESS;
    pthread_mutex_lock(&allocations_lock);
    struct allocation *found = find_allocation(pointer);
    if (found) {
        if (found->kind == DEVICE_MEMORY) {
            used[found->device] -= found->bytes;
            count(ALLOCATED, -(int64_t)found->bytes);
        }
        munmap(found->start, found->bytes);
        found->start = NULL;
    }
    pthread_mutex_unlock(&allocations_lock);
    return found ? SUCCESS : fail(INVALID_VALUE);
}

int cudaMalloc(void **out, size_t bytes) {
    NOT_DURING_CAPTURE(NULL);
    return allocate(out, bytes, DEVICE_MEMORY);
}

int cudaMallocAsync(void **out, size_t bytes, struct stream *stream) { return allocate(out, bytes, DEVICE_MEMORY); }

int cudaMallocFromPoolAsync(void **out, size_t bytes, void *pool, struct stream *stream) {
    return allocate(out, bytes, DEVICE_MEMORY);
}

int cudaMallocHost(void **out, size_t bytes) {
    NOT_DURING_CAPTURE(NULL);
    return allocate(out, bytes, HOST_MEMORY);
}

int cudaHostAlloc(void **out, size_t bytes, unsigned flags) { return cudaMallocHost(out, bytes); }

int cudaFree(void *pointer) {
    NOT_DURING_CAPTURE(NULL);
    return release(pointer);
}

int cudaFreeAsync(void *pointer, struct stream *stream) { return release(pointer); }

int cudaFreeHost(void *pointer) { return cudaFree(pointer); }

int cudaMemGetInfo(size_t *unused, size_t *total) {
    NEEDS_DEVICE();
    *total = memory_of_each();
    *unused = *total - used[current_device];
    return SUCCESS;
}

// struct cudaPointerAttributes of driver_types.h.
struct pointer_attributes {
    int type, device;
    void *device_pointer, *host_pointer;
};

int cudaPointerGetAttributes(struct pointer_attributes *out, const void *pointer) {
    memset(out, 0, sizeof(*out));
    pthread_mutex_lock(&allocations_lock);
    struct allocation *found = find_allocation(pointer);
    if (found) *out = (struct pointer_attributes){found->kind, found->device, (void *)pointer, NULL};
    if (!found || found->kind == HOST_MEMORY) out->host_pointer = (void *)pointer;
    pthread_mutex_unlock(&allocations_lock);
    return SUCCESS;
}

static int is_on_device(const void *pointer) {
    struct pointer_attributes attributes;
    cudaPointerGetAttributes(&attributes, pointer);
    return attributes.type == DEVICE_MEMORY;
}

// Counts a copy and says whether it is to be made.
static int count_copy(const void *to, const void *from, size_t bytes, int kind, const struct stream *stream) {
    if (kind == ANY_KIND) {
        int start = is_on_device(from), end = is_on_device(to);
        kind = start && end ? ON_DEVICE_KIND : end ? TO_DEVICE_KIND : start ? TO_HOST_KIND : 0;
    }
    if (is_capturing(stream)) {
        count(CAPTURED_COPIES, 1);
        return 0;
    }
    if (kind == TO_DEVICE_KIND) count(TO_DEVICE, 1), count(BYTES_TO_DEVICE, (int64_t)bytes);
    if (kind == TO_HOST_KIND) count(TO_HOST, 1), count(BYTES_TO_HOST, (int64_t)bytes);
    if (kind == ON_DEVICE_KIND) count(ON_DEVICE, 1);
    int64_t most = setting("CUDA_STUB_DISCARD", INT64_MAX);
    return kind != TO_DEVICE_KIND || (int64_t)bytes < most;
}

int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, struct stream *stream) {
    NEEDS_DEVICE();
    if (bytes && count_copy(to, from, bytes, kind, stream)) memmove(to, from, bytes);
    return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    NOT_DURING_CAPTURE(NULL);
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height,
                      int kind, struct stream *stream) {
    NEEDS_DEVICE();
    if (!width || !height || !count_copy(to, from, width * height, kind, stream)) return SUCCESS;
    for (size_t row = 0; row < height; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
    return SUCCESS;
}

int cudaMemcpyFromSymbol(void *to, const void *symbol, size_t bytes, size_t offset, int kind) {
    NOT_DURING_CAPTURE(NULL);
    count(TO_HOST, 1);
    memset(to, 0, bytes);
    return SUCCESS;
}

int cudaMemsetAsync(void *to, int value, size_t bytes, struct stream *stream) {
    NEEDS_DEVICE();
    if (is_capturing(stream)) return SUCCESS;
    // Pages that are given back read as zeros and take no memory, which a large cache would.
    uintptr_t first = ((uintptr_t)to + PAGE - 1) / PAGE * PAGE, end = ((uintptr_t)to + bytes) / PAGE * PAGE;
    if (value == 0 && end > first && is_on_device(to)) {
        memset(to, 0, first - (uintptr_t)to);
        madvise((void *)first, end - first, MADV_DONTNEED);
        memset((void *)end, 0, (uintptr_t)to + bytes - end);
    } else {
        memset(to, value, bytes);
    }
    return SUCCESS;
}

int cudaMemset(void *to, int value, size_t bytes) {
    NOT_DURING_CAPTURE(NULL);
    return cudaMemsetAsync(to, value, bytes, NULL);
}

CREATES(cudaMemPoolCreate)
SUCCEEDS(cudaMemPoolDestroy)
SUCCEEDS(cudaMemPoolSetAttribute)
SUCCEEDS(cudaMemPoolTrimTo)

int cudaMemPoolGetAttribute(void *pool, int attribute, uint64_t *value) {
    *value = 0;
    return SUCCESS;
}

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

// ---- Kernels ----

// Compute capabilities that the registered device code was compiled for, as 10 * major + minor; code for one of them
// alone, as for sm_90a, runs on no later one.
enum { FOR_LATER = 1, ALONE = 2 };
static char compiled_for[MOST_CAPABILITIES];
static int oldest_ptx = MOST_CAPABILITIES;

// Reads which capabilities a fat binary has code for: a header of 16 bytes (magic number, version, its size, size of
// what follows), then entries, each with a header (kind at 0, its size at 4, size of the code at 8, capability at 28,
// flags at 40).
void **__cudaRegisterFatBinary(void *wrapper) {
    enum { PTX = 1, ELF = 2, FLAG_ALONE = 1 << 20 };
    static const uint32_t MAGIC = 0xBA55ED50;
    static void *handle;
    struct {
        int magic, version;
        const char *data;
    } *binary = wrapper;
    const char *at = binary->data;
    uint32_t magic, header, capability;
    uint16_t kind, file_header;
    uint64_t size, flags;
    memcpy(&magic, at, 4);
    memcpy(&file_header, at + 6, 2);
    memcpy(&size, at + 8, 8);
    if (magic != MAGIC) return &handle;
    const char *end = at + file_header + size;
    for (at += file_header; at + 48 <= end; at += header + size) {
        memcpy(&kind, at, 2);
        memcpy(&header, at + 4, 4);
        memcpy(&size, at + 8, 8);
        memcpy(&capability, at + 28, 4);
        memcpy(&flags, at + 40, 8);
        if (kind == ELF && capability < MOST_CAPABILITIES)
            compiled_for[capability] |= flags & FLAG_ALONE ? ALONE : FOR_LATER;
        if (kind == PTX && (int)capability < oldest_ptx) oldest_ptx = (int)capability;
    }
    return &handle;
}

// Code runs on the same major capability and no lower minor one; PTX on every later one.
static int launch_error(void) {
    int major, minor, error = driver_error();
    if (error) return error;
    capability_of(installed(current_device), &major, &minor);
    if (compiled_for[10 * major + minor]) return SUCCESS;
    for (int lower = 0; lower < minor; lower++)
        if (compiled_for[10 * major + lower] & FOR_LATER) return SUCCESS;
    return oldest_ptx <= 10 * major + minor ? SUCCESS : NO_KERNEL_IMAGE;
}

static int launch(struct stream *stream) {
    int error = launch_error();
    if (error) return fail(error);
    count_work(stream, LAUNCHES);
    return SUCCESS;
}

int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                     struct stream *stream) {
    return launch(stream);
}

int __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, struct stream *stream) {
    return launch(stream);
}

int cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                struct stream *stream) {
    return launch(stream);
}

// The beginning of cudaLaunchConfig_st of driver_types.h.
struct launch_config {
    dim3 grid, block;
    size_t shared;
    struct stream *stream;
};

int cudaLaunchKernelExC(const struct launch_config *config, const void *function, void **arguments) {
    return launch(config->stream);
}

static _Thread_local struct launch_config pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct stream *stream) {
    pushed = (struct launch_config){grid, block, shared, stream};
    return 0;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, struct stream **stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *stream = pushed.stream;
    return SUCCESS;
}

int __cudaGetKernel(const void **kernel, const void *function) {
    *kernel = function;
    return SUCCESS;
}

// The beginning of cudaFuncAttributes of driver_types.h.
struct function_attributes {
    size_t shared, constant, local;
    int threads, registers, ptx_version, binary_version, cache_mode, dynamic_shared;
};

int cudaFuncGetAttributes(struct function_attributes *out, const void *function) {
    int error = launch_error();
    if (error) return fail(error);
    memset(out, 0, sizeof(*out));
    int major, minor;
    capability_of(installed(current_device), &major, &minor);
    out->threads = 1024;
    out->registers = 32;
    out->ptx_version = out->binary_version = 10 * major + minor;
    out->dynamic_shared = 48 << 10;
    return SUCCESS;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                           size_t shared, unsigned flags) {
    *blocks = 1;
    return SUCCESS;
}

SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaRegisterFunction)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice)
CREATES(cudaLibraryLoadData)
CREATES(cudaLibraryGetKernel)
SUCCEEDS(cudaLibraryUnload)
