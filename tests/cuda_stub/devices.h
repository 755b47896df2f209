// A part of runtime.c: the devices of libcudart.so.13.

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
