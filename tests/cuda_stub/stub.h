// What the libraries of the stub share: settings, counters, devices and streams.
//
// The stub stands in for the CUDA driver, the CUDA runtime and cuBLAS on a machine without a GPU. Calls succeed,
// memory is host memory that starts as zeros, copies are made, and kernels do nothing. Results are therefore
// meaningless, but what ONNX Runtime and onnxruntime-genai place on the device, launch, copy, wait for and
// report as an error is what they do on a GPU.
//
// Settings, all of them environment variables:
//   CUDA_STUB_CAPABILITY  compute capability of each device, in CUDA's default order: "9.0" or "9.0,8.6"
//   CUDA_STUB_DEVICES     number of devices; the last capability is that of all further ones
//   CUDA_STUB_NAME        name of each device, separated by commas, the last for all further ones
//   CUDA_STUB_DRIVER      version of the driver, as cuDriverGetVersion gives it: 13000
//   CUDA_STUB_INIT        what cuInit returns, where it would succeed: 803
//   CUDA_STUB_MEMORY      bytes of each device; an allocation beyond them fails
//   CUDA_STUB_DISCARD     copies to a device of so many bytes or more are counted and not made
//   CUDA_STUB_COUNT       file that the counters are kept in, as 64-bit integers in the order of `enum counter`
//   CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER  as CUDA reads them; PCI_BUS_ID is the default order reversed

#ifndef LLMC_CUDA_STUB_H
#define LLMC_CUDA_STUB_H

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// Functions that take anything and do nothing. In C an empty list of parameters accepts every call.
#define SUCCEEDS(name) \
    int name() { return 0; }
// Functions that create an object behind their first parameter.
#define CREATES(name)             \
    int name(void **object) {     \
        *object = calloc(1, 256); \
        return 0;                 \
    }

enum counter {
    LAUNCHES,       // kernels started one by one
    PRODUCTS,       // calls of cuBLAS that multiply
    SYNCS,          // calls that wait for a device
    TO_DEVICE,      // copies, by direction
    TO_HOST,
    ON_DEVICE,
    GRAPHS,         // launches of a graph
    CAPTURED,       // kernels and products that became part of a graph
    CAPTURED_COPIES,
    ALLOCATED,      // bytes of device memory in use
    ALLOCATED_PEAK,
    BYTES_TO_DEVICE,
    BYTES_TO_HOST,
    COUNTERS,
};

// Codes that the runtime and the driver share (driver_types.h, cuda.h).
enum error {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INSUFFICIENT_DRIVER = 35,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    NO_KERNEL_IMAGE = 209,
    NOT_FOUND = 500,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
};

enum { MOST_DEVICES = 16, RUNTIME_VERSION = 13000 };

struct stream {
    int capturing;
    int invalidated;
};

static int64_t unseen_counters[COUNTERS];
static int64_t *counters = unseen_counters;

__attribute__((constructor)) static void map_counters(void) {
    const char *path = getenv("CUDA_STUB_COUNT");
    int file = path ? open(path, O_RDWR | O_CREAT, 0644) : -1;
    if (file < 0) return;
    if (ftruncate(file, sizeof(unseen_counters)) == 0) {
        void *mapped = mmap(NULL, sizeof(unseen_counters), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) counters = mapped;
    }
    close(file);
}

static inline int64_t count(enum counter which, int64_t amount) {
    return __atomic_add_fetch(&counters[which], amount, __ATOMIC_RELAXED);
}

// 0, 1 and 2 are the handles of the default streams.
static inline int is_capturing(const struct stream *stream) { return (uintptr_t)stream > 2 && stream->capturing; }

static inline void count_work(const struct stream *stream, enum counter which) {
    count(is_capturing(stream) ? CAPTURED : which, 1);
}

static inline int64_t setting(const char *name, int64_t otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtoll(text, NULL, 10) : otherwise;
}

// Copies element `index` of a list with commas, or its last.
static inline void element(const char *list, int index, char *out, size_t size) {
    const char *end;
    while ((end = strchr(list, ',')) && index-- > 0) list = end + 1;
    size_t length = end ? (size_t)(end - list) : strlen(list);
    if (length >= size) length = size - 1;
    memcpy(out, list, length);
    out[length] = 0;
}

static inline const char *stated_capabilities(void) {
    const char *list = getenv("CUDA_STUB_CAPABILITY");
    return list && *list ? list : "9.0";
}

static inline int installed_devices(void) {
    int listed = 1;
    for (const char *at = stated_capabilities(); (at = strchr(at, ',')); at++) listed++;
    int64_t devices = setting("CUDA_STUB_DEVICES", listed);
    if (devices != 0 && devices < listed) devices = listed;
    return devices > MOST_DEVICES ? MOST_DEVICES : (int)devices;
}

// The number of a device in CUDA_STUB_CAPABILITY is also the last byte of its UUID, plus 1.
static inline void uuid_of(int device, char out[16]) {
    memset(out, 0, 16);
    out[15] = (char)(device + 1);
}

static inline int bus_of(int device) { return installed_devices() - device; }

static inline void capability_of(int device, int *major, int *minor) {
    char text[16];
    element(stated_capabilities(), device, text, sizeof(text));
    if (sscanf(text, "%d.%d", major, minor) != 2) *major = 9, *minor = 0;
}

static inline void name_of(int device, char *out, size_t size) {
    const char *names = getenv("CUDA_STUB_NAME");
    int major, minor;
    capability_of(device, &major, &minor);
    if (names && *names)
        element(names, device, out, size);
    else
        snprintf(out, size, "CUDA stub %d.%d", major, minor);
}

static inline size_t memory_of_each(void) { return (size_t)setting("CUDA_STUB_MEMORY", 16LL << 30); }

// Lists the visible devices and returns their number. An invalid element of CUDA_VISIBLE_DEVICES ends it.
static inline int visible_devices(int out[MOST_DEVICES]) {
    int installed = installed_devices(), visible = 0;
    const char *order = getenv("CUDA_DEVICE_ORDER"), *list = getenv("CUDA_VISIBLE_DEVICES");
    int reversed = order && strcmp(order, "PCI_BUS_ID") == 0;
    if (!list) {
        for (; visible < installed; visible++) out[visible] = reversed ? installed - 1 - visible : visible;
        return visible;
    }
    while (*list && visible < MOST_DEVICES) {
        int found = -1;
        if (strncmp(list, "GPU-", 4) == 0) {
            size_t length = strcspn(list, ",");
            for (int device = 0; device < installed; device++) {
                char text[64];
                snprintf(text, sizeof(text), "GPU-00000000-0000-0000-0000-0000000000%02x", device + 1);
                if (strncmp(text, list, length) == 0) found = device;
            }
        } else {
            char *end;
            long index = strtol(list, &end, 10);
            if (end != list && index >= 0 && index < installed) found = reversed ? installed - 1 - index : index;
        }
        if (found < 0) break;
        out[visible++] = found;
        list += strcspn(list, ",");
        list += *list == ',';
    }
    return visible;
}

// Limits that depend on the compute capability: "Technical Specifications per Compute Capability" of the CUDA C++
// Programming Guide. The number of multiprocessors is that of one GPU of each kind.
struct limits {
    int capability, multiprocessors, threads, blocks, shared, shared_optin;
};

static inline struct limits limits_of(int device) {
    static const struct limits known[] = {
        {75, 40, 1024, 16, 64 << 10, 64 << 10},    {80, 108, 2048, 32, 164 << 10, 163 << 10},
        {86, 72, 1536, 16, 100 << 10, 99 << 10},   {87, 16, 1536, 16, 164 << 10, 163 << 10},
        {89, 58, 1536, 24, 100 << 10, 99 << 10},   {90, 132, 2048, 32, 228 << 10, 227 << 10},
        {100, 148, 2048, 32, 228 << 10, 227 << 10}, {120, 188, 1536, 24, 100 << 10, 99 << 10},
    };
    int major, minor;
    capability_of(device, &major, &minor);
    struct limits found = known[0];
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (known[i].capability <= 10 * major + minor) found = known[i];
    return found;
}

// An attribute of a device, by its number in `enum cudaDeviceAttr` of driver_types.h, which is that of
// `CUdevice_attribute` of cuda.h. What nobody asked for yet is 0.
static inline int attribute_of(int device, int attribute) {
    struct limits limits = limits_of(device);
    int major, minor;
    capability_of(device, &major, &minor);
    switch (attribute) {
        case 1: case 2: case 3: return 1024;  // threads of a block
        case 4: return 64;
        case 5: return 2147483647;            // blocks of a grid
        case 6: case 7: return 65535;
        case 8: return 48 << 10;              // shared memory of a block
        case 9: return 64 << 10;              // constant memory
        case 10: return 32;                   // threads of a warp
        case 11: return 2147483647;           // pitch of a copy
        case 12: case 82: return 65536;       // registers
        case 14: case 51: return 512;         // alignment of textures
        case 16: return limits.multiprocessors;
        case 19: case 31: case 41: case 78: case 95: case 115: return 1;  // what every GPU of this decade can
        case 33: return bus_of(device);
        case 38: return 32 << 20;             // second level cache
        case 39: return limits.threads;
        case 40: return 2;                    // engines that copy
        case 75: return major;
        case 76: return minor;
        case 81: return limits.shared;
        case 97: return limits.shared_optin;
        case 106: return limits.blocks;
        case 111: return 1024;                // shared memory that the driver takes
        case 120: return major >= 9;          // clusters
        default: return 0;
    }
}

// Texts are those of cudaGetErrorString; cuGetErrorString has the same.
static inline const char *error_text(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case INVALID_VALUE: return "invalid argument";
        case OUT_OF_MEMORY: return "out of memory";
        case INSUFFICIENT_DRIVER: return "CUDA driver version is insufficient for CUDA runtime version";
        case NO_DEVICE: return "no CUDA-capable device is detected";
        case INVALID_DEVICE: return "invalid device ordinal";
        case NO_KERNEL_IMAGE: return "no kernel image is available for execution on the device";
        case NOT_FOUND: return "named symbol not found";
        case 803: return "system has unsupported display driver / cuda driver combination";
        case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
        case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
        default: return "unrecognized error code";
    }
}

#endif
