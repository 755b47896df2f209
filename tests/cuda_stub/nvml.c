// libnvidia-ml.so.1 of the stub: energy counters of the GPUs, which advance in ticks as real ones do.

#include <time.h>

#include "stub.h"

enum { NVML_SUCCESS = 0, NVML_NOT_FOUND = 6 };

// Watts of the first GPU; each further one takes as much more.
static const int64_t watts = 100;

// Handles are the devices' numbers plus one, since a handle is not null.
static int number_of(const void *handle) { return (int)((intptr_t)handle - 1); }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    return NVML_SUCCESS;
}

int nvmlShutdown(void) { return NVML_SUCCESS; }

const char *nvmlErrorString(int code) { return code == NVML_NOT_FOUND ? "Not Found" : "Success"; }

int nvmlDeviceGetHandleByUUID(const char *text, void **handle) {
    for (int device = 0; device < MOST_DEVICES; device++) {
        unsigned char uuid[16];
        char own[48] = "GPU-";
        size_t length = 4;
        uuid_of(device, (char *)uuid);
        for (int byte = 0; byte < 16; byte++) {
            const char *dash = byte == 4 || byte == 6 || byte == 8 || byte == 10 ? "-" : "";
            length += (size_t)snprintf(own + length, sizeof own - length, "%s%02x", dash, uuid[byte]);
        }
        if (!strcmp(own, text)) {
            *handle = (void *)(intptr_t)(device + 1);
            return NVML_SUCCESS;
        }
    }
    return NVML_NOT_FOUND;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    name_of(number_of(handle), name, length);
    return NVML_SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, uint64_t *millijoules) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t period = setting("CUDA_STUB_ENERGY_MS", 50), passed = now.tv_sec * 1000 + now.tv_nsec / 1000000;
    *millijoules = (uint64_t)(period ? passed / period * period * watts * (number_of(handle) + 1) : 1);
    return NVML_SUCCESS;
}
