// A part of runtime.c: kernels of libcudart.so.13, which do nothing.

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
