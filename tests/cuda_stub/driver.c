// libcuda.so.1 of the stub: what the driver says of its devices. Nothing is executed through it.

#include "stub.h"

// The handle of a device is its number among the visible ones.
static int device_of(int handle) {
    int devices[MOST_DEVICES];
    return handle >= 0 && handle < visible_devices(devices) ? devices[handle] : -1;
}

int cuInit(unsigned flags) {
    (void)flags;
    int devices[MOST_DEVICES];
    int64_t stated = setting("CUDA_STUB_INIT", SUCCESS);
    return stated ? (int)stated : visible_devices(devices) ? SUCCESS : NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    *version = (int)setting("CUDA_STUB_DRIVER", RUNTIME_VERSION);
    return SUCCESS;
}

int cuDeviceGetCount(int *number) {
    int devices[MOST_DEVICES];
    *number = visible_devices(devices);
    return SUCCESS;
}

int cuDeviceGet(int *handle, int ordinal) {
    *handle = ordinal;
    return device_of(ordinal) < 0 ? INVALID_DEVICE : SUCCESS;
}

int cuDeviceGetName(char *name, int length, int handle) {
    int device = device_of(handle);
    if (device < 0) return INVALID_DEVICE;
    name_of(device, name, (size_t)length);
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int handle) {
    int device = device_of(handle);
    if (device < 0) return INVALID_DEVICE;
    *value = attribute_of(device, attribute);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int handle) {
    if (device_of(handle) < 0) return INVALID_DEVICE;
    *bytes = memory_of_each();
    return SUCCESS;
}

int cuDeviceGetUuid(char uuid[16], int handle) {
    int device = device_of(handle);
    if (device < 0) return INVALID_DEVICE;
    uuid_of(device, uuid);
    return SUCCESS;
}

int cuDeviceGetUuid_v2(char uuid[16], int handle) { return cuDeviceGetUuid(uuid, handle); }

int cuDeviceGetPCIBusId(char *text, int length, int handle) {
    int device = device_of(handle);
    if (device < 0) return INVALID_DEVICE;
    snprintf(text, (size_t)length, "00000000:%02X:00.0", bus_of(device));
    return SUCCESS;
}

CREATES(cuDevicePrimaryCtxRetain)
SUCCEEDS(cuCtxSetCurrent)

// What is in use is known where the process counts.
int cuMemGetInfo_v2(size_t *available, size_t *total) {
    *total = memory_of_each();
    *available = *total - (size_t)counters[ALLOCATED];
    return SUCCESS;
}

int cuGetErrorString(int code, const char **text) {
    *text = error_text(code);
    return SUCCESS;
}

SUCCEEDS(cuTensorMapEncodeTiled)
