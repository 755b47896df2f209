// A part of runtime.c: memory and copies of libcudart.so.13.

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
