// libcuda: the calls that the program makes, and no others. Each checks its contract before it does anything.

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>

#include "runtime.h"

using namespace emulator;

namespace {

struct Module {
    std::string program;
};

struct Function {
    const Kernel* kernel;
    size_t most_dynamic;
};

bool initialised;
int context_of_device;
int retained;
thread_local void* current_context;
std::set<Module*> modules;
std::set<Function*> functions;

constexpr size_t SHARED_BYTES = 48 << 10;

size_t shared_optin() { return number_from("TIDEMILL_EMULATOR_SHARED_OPTIN", 99 << 10); }

// Begins every call that needs a context.
Status begin() {
    if (!initialised) return violation(NOT_INITIALIZED, "a call before cuInit");
    if (!current_context) return violation(INVALID_CONTEXT, "a call on a thread without a current context");
    run_some();
    return broken();
}

Stream* stream_of(void* handle, Status* status) {
    auto* stream = handle ? static_cast<Stream*>(handle) : default_stream();
    if (!is_stream(stream)) *status = violation(INVALID_HANDLE, "a stream that does not exist");
    return stream;
}

Event* event_of(void* handle, Status* status) {
    auto* event = static_cast<Event*>(handle);
    if (!is_event(event)) *status = violation(INVALID_HANDLE, "an event that does not exist");
    return event;
}

Status in_device(uint64_t address, size_t bytes, const char* what) {
    if (is_device(reinterpret_cast<void*>(address), bytes)) return SUCCESS;
    return violation(INVALID_VALUE, "%s: %zu bytes at %#zx are not within an allocation", what, bytes, size_t(address));
}

Status pinned_for(const void* host, size_t bytes, const char* what) {
    if (is_pinned(host, bytes)) return SUCCESS;
    return violation(INVALID_VALUE, "%s: %zu bytes of main memory that are not pinned", what, bytes);
}

void* pointer(uint64_t address) { return reinterpret_cast<void*>(address); }

// Checks and queues; `run` is what the device does.
Status queue(void* handle, const char* name, std::function<void()> run) {
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    if (status) return status;
    Operation operation;
    operation.name = name;
    operation.run = [run = std::move(run)] {
        run();
        return SUCCESS;
    };
    enqueue(stream, std::move(operation));
    return SUCCESS;
}

}  // namespace

// For the other stand-ins: work of theirs, in a stream.
extern "C" EXPORT Status tidemill_emulator_enqueue(void* stream, const char* name, void (*run)(void*),
                                                   void (*drop)(void*), void* data) {
    Lock lock;
    if (Status status = begin()) return status;
    std::shared_ptr<void> owned(data, drop);
    return queue(stream, name, [run, owned] { run(owned.get()); });
}

extern "C" EXPORT int tidemill_emulator_is_device(const void* address, size_t bytes) {
    Lock lock;
    return is_device(address, bytes);
}

#define ENTRY extern "C" EXPORT Status
#define BEGIN  \
    Lock lock; \
    if (Status status = begin()) return status

// ---- device and context

ENTRY cuInit(unsigned) {
    Lock lock;
    if (number_from("TIDEMILL_EMULATOR_DEVICES", 1) == 0) return NO_DEVICE;
    initialised = true;
    return SUCCESS;
}

ENTRY cuDriverGetVersion(int* version) {
    *version = int(number_from("TIDEMILL_EMULATOR_DRIVER", 12080));
    return SUCCESS;
}

ENTRY cuDeviceGetCount(int* count) {
    *count = int(number_from("TIDEMILL_EMULATOR_DEVICES", 1));
    return initialised ? SUCCESS : NOT_INITIALIZED;
}

ENTRY cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= int(number_from("TIDEMILL_EMULATOR_DEVICES", 1))) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

ENTRY cuDeviceGetName(char* name, int length, int) {
    std::snprintf(name, size_t(length), "Tidemill emulator");
    return SUCCESS;
}

ENTRY cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    std::memset(uuid, 0xe0 + device, 16);
    return SUCCESS;
}

ENTRY cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = memory_bytes();
    return SUCCESS;
}

ENTRY cuDeviceGetAttribute(int* value, int attribute, int) {
    // Major and minor, as 80 for 8.0.
    uint64_t capability = number_from("TIDEMILL_EMULATOR_CAPABILITY", 80);
    switch (attribute) {
    case 1: *value = 1024; return SUCCESS;               // threads of a block
    case 8: *value = int(SHARED_BYTES); return SUCCESS;  // shared memory of a block
    case 10: *value = 32; return SUCCESS;                // lanes of a warp
    case 13: *value = 1'000'000; return SUCCESS;         // clock, kHz
    case 16: *value = int(number_from("TIDEMILL_EMULATOR_PROCESSORS", 4)); return SUCCESS;
    case 18: *value = 0; return SUCCESS;          // integrated
    case 36: *value = 1'000'000; return SUCCESS;  // memory clock, kHz
    case 37: *value = 128; return SUCCESS;        // bits of the memory bus
    case 38: *value = 4 << 20; return SUCCESS;    // second-level cache
    case 40: *value = 2; return SUCCESS;          // copy engines
    case 41: *value = 1; return SUCCESS;          // unified addressing
    case 75: *value = int(capability / 10); return SUCCESS;
    case 76: *value = int(capability % 10); return SUCCESS;
    case 97: *value = int(shared_optin()); return SUCCESS;  // shared memory of a block, on request
    case 115: *value = 0; return SUCCESS;                   // memory pools
    default: return violation(INVALID_VALUE, "device attribute %d is not emulated", attribute);
    }
}

ENTRY cuDevicePrimaryCtxRetain(void** context, int) {
    Lock lock;
    if (!initialised) return violation(NOT_INITIALIZED, "a call before cuInit");
    retained++;
    *context = &context_of_device;
    return broken();
}

ENTRY cuDevicePrimaryCtxRelease_v2(int) {
    Lock lock;
    if (retained == 0) return violation(INVALID_CONTEXT, "the context is released more often than retained");
    if (--retained > 0) return SUCCESS;
    return finish_all();
}

ENTRY cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }

ENTRY cuCtxGetCurrent(void** context) {
    *context = current_context;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}

ENTRY cuCtxSetCurrent(void* context) {
    Lock lock;
    if (context && (context != &context_of_device || retained == 0))
        return violation(INVALID_CONTEXT, "a context that does not exist is made current");
    current_context = context;
    return SUCCESS;
}

ENTRY cuCtxSynchronize() {
    BEGIN;
    return finish_all();
}

// ---- memory

ENTRY cuMemGetInfo_v2(size_t* free, size_t* total) {
    BEGIN;
    *total = memory_bytes();
    *free = *total - allocated_bytes();
    return SUCCESS;
}

ENTRY cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    BEGIN;
    void* start = nullptr;
    Status status = allocate(bytes, &start);
    *address = reinterpret_cast<uint64_t>(start);
    return status;
}

ENTRY cuMemFree_v2(uint64_t address) {
    BEGIN;
    if (Status status = finish_all()) return status;
    return release(pointer(address));
}

ENTRY cuMemHostAlloc(void** address, size_t bytes, unsigned) {
    BEGIN;
    *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*address == MAP_FAILED) return OUT_OF_MEMORY;
    std::memset(*address, POISON, bytes);
    return pin(*address, bytes, true, true);
}

ENTRY cuMemFreeHost(void* address) {
    BEGIN;
    if (Status status = finish_all()) return status;
    return unpin(address, true);
}

ENTRY cuMemHostRegister_v2(void* address, size_t bytes, unsigned flags) {
    BEGIN;
    if (reinterpret_cast<uintptr_t>(address) % 4096 != 0)
        return violation(INVALID_VALUE, "main memory is registered that does not begin with a page");
    // 2 asks for it to be mapped.
    return pin(address, bytes, false, (flags & 2) != 0);
}

ENTRY cuMemHostGetDevicePointer_v2(uint64_t* address, void* host, unsigned) {
    BEGIN;
    if (!is_mapped(host)) return violation(INVALID_VALUE, "main memory that is not mapped");
    *address = reinterpret_cast<uint64_t>(host);
    return SUCCESS;
}

ENTRY cuMemHostUnregister(void* address) {
    BEGIN;
    if (Status status = finish_all()) return status;
    return unpin(address, false);
}

ENTRY cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    BEGIN;
    if (Status status = in_device(to, bytes, "cuMemcpyHtoDAsync")) return status;
    if (Status status = pinned_for(from, bytes, "cuMemcpyHtoDAsync")) return status;
    return queue(stream, "copy to the device", [=] { std::memcpy(pointer(to), from, bytes); });
}

ENTRY cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    BEGIN;
    if (Status status = in_device(from, bytes, "cuMemcpyDtoHAsync")) return status;
    if (Status status = pinned_for(to, bytes, "cuMemcpyDtoHAsync")) return status;
    return queue(stream, "copy from the device", [=] { std::memcpy(to, pointer(from), bytes); });
}

ENTRY cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    BEGIN;
    if (Status status = in_device(from, bytes, "cuMemcpyDtoDAsync")) return status;
    if (Status status = in_device(to, bytes, "cuMemcpyDtoDAsync")) return status;
    if (from < to + bytes && to < from + bytes) return violation(INVALID_VALUE, "cuMemcpyDtoDAsync: ranges overlap");
    return queue(stream, "copy within the device", [=] { std::memcpy(pointer(to), pointer(from), bytes); });
}

ENTRY cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    BEGIN;
    if (Status status = in_device(to, bytes, "cuMemsetD8Async")) return status;
    return queue(stream, "fill", [=] { std::memset(pointer(to), value, bytes); });
}

// Copies that wait; the default stream is over first.
ENTRY cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    BEGIN;
    if (Status status = in_device(to, bytes, "cuMemcpyHtoD")) return status;
    if (Status status = finish(default_stream())) return status;
    std::memcpy(pointer(to), from, bytes);
    return SUCCESS;
}

ENTRY cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    BEGIN;
    if (Status status = in_device(from, bytes, "cuMemcpyDtoH")) return status;
    if (Status status = finish(default_stream())) return status;
    std::memcpy(to, pointer(from), bytes);
    return SUCCESS;
}

// ---- streams and events

ENTRY cuStreamCreate(void** stream, unsigned flags) {
    BEGIN;
    // Streams that wait for the default stream are not emulated.
    if (flags != 1) return violation(INVALID_VALUE, "streams are made with CU_STREAM_NON_BLOCKING");
    *stream = new_stream();
    return SUCCESS;
}

ENTRY cuStreamDestroy_v2(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    return status ? status : end_stream(stream);
}

ENTRY cuStreamSynchronize(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    if (status) return status;
    if (!stream->queue.empty()) trace_wait("cuStreamSynchronize");
    return finish(stream);
}

ENTRY cuStreamQuery(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    if (status || stream->queue.empty()) return status;
    run_one();
    return stream->queue.empty() ? broken() : NOT_READY;
}

ENTRY cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    BEGIN;
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    Event* event = event_of(event_handle, &status);
    if (status) return status;
    if (event->recorded == 0) return violation(INVALID_HANDLE, "a stream waits for an event that was never recorded");
    if (is_deaf(stream)) return SUCCESS;
    Operation operation;
    operation.name = "wait";
    operation.wait = event;
    operation.ticket = event->recorded;
    enqueue(stream, std::move(operation));
    return SUCCESS;
}

ENTRY cuEventCreate(void** event, unsigned flags) {
    BEGIN;
    *event = new_event((flags & 2) == 0);
    return SUCCESS;
}

ENTRY cuEventRecord(void* event_handle, void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Stream* stream = stream_of(handle, &status);
    Event* event = event_of(event_handle, &status);
    if (status) return status;
    Operation operation;
    operation.name = "record";
    operation.record = event;
    operation.ticket = ++event->recorded;
    enqueue(stream, std::move(operation));
    return SUCCESS;
}

ENTRY cuEventQuery(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Event* event = event_of(handle, &status);
    if (status) return status;
    if (event->recorded == 0) return violation(INVALID_HANDLE, "an event is asked for that was never recorded");
    if (event->completed == event->recorded) return SUCCESS;
    run_one();
    if (Status status = broken()) return status;
    return event->completed == event->recorded ? SUCCESS : NOT_READY;
}

ENTRY cuEventSynchronize(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Event* event = event_of(handle, &status);
    if (status) return status;
    if (event->recorded == 0) return violation(INVALID_HANDLE, "an event is waited for that was never recorded");
    uint64_t ticket = event->recorded;
    if (event->completed < ticket) trace_wait("cuEventSynchronize");
    while (event->completed < ticket && !broken())
        if (!run_one()) return violation(LAUNCH_FAILED, "an event is waited for that nothing will record");
    return broken();
}

ENTRY cuEventElapsedTime(float* milliseconds, void* start_handle, void* end_handle) {
    BEGIN;
    Status status = SUCCESS;
    Event *start = event_of(start_handle, &status), *end = event_of(end_handle, &status);
    if (status) return status;
    if (!start->timing || !end->timing) return violation(INVALID_HANDLE, "time between events that take none");
    if (start->recorded == 0 || end->recorded == 0) return violation(INVALID_HANDLE, "time of events never recorded");
    if (start->completed < start->recorded || end->completed < end->recorded) return NOT_READY;
    *milliseconds = float((end->time - start->time) * 1e3);
    return SUCCESS;
}

ENTRY cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}

ENTRY cuEventDestroy_v2(void* handle) {
    BEGIN;
    Status status = SUCCESS;
    Event* event = event_of(handle, &status);
    return status ? status : end_event(event);
}

// ---- modules and launches

ENTRY cuModuleLoadData(void** module, const void* image) {
    BEGIN;
    // What the NVRTC stand-in gives: a word, and the hash of the program.
    auto* text = static_cast<const char*>(image);
    constexpr char MAGIC[] = "tidemill-emulated ";
    if (std::strncmp(text, MAGIC, sizeof MAGIC - 1) != 0)
        return violation(INVALID_IMAGE, "a module that the NVRTC stand-in did not make");
    std::string program = text + sizeof MAGIC - 1;
    if (!has_program(program))
        return violation(INVALID_IMAGE, "program %s was not built into the emulator: build it again", program.c_str());
    auto* loaded = new Module{program};
    modules.insert(loaded);
    *module = loaded;
    return SUCCESS;
}

ENTRY cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

ENTRY cuModuleUnload(void* module) {
    BEGIN;
    if (modules.erase(static_cast<Module*>(module)) == 0)
        return violation(INVALID_HANDLE, "a module is unloaded that is not loaded");
    delete static_cast<Module*>(module);
    return SUCCESS;
}

ENTRY cuModuleGetFunction(void** function, void* handle, const char* name) {
    BEGIN;
    auto* module = static_cast<Module*>(handle);
    if (modules.count(module) == 0) return violation(INVALID_HANDLE, "a function of a module that is not loaded");
    const Kernel* kernel = find_kernel(module->program, name);
    // Before 8.0 there are no matrices of bf16, and the programs have no kernels for them.
    bool bf16 = number_from("TIDEMILL_EMULATOR_CAPABILITY", 80) >= 80 || !std::strstr(name, "_tensor_bf16_");
    if (!kernel || !bf16) return NOT_FOUND;
    auto* found = new Function{kernel, 0};
    functions.insert(found);
    *function = found;
    return SUCCESS;
}

ENTRY cuFuncSetAttribute(void* handle, int attribute, int value) {
    BEGIN;
    auto* function = static_cast<Function*>(handle);
    if (functions.count(function) == 0) return violation(INVALID_HANDLE, "a function that does not exist");
    // 8 is the most dynamic shared memory, 9 the share of the cache that is shared memory.
    if (attribute == 8) {
        if (value < 0 || size_t(value) > shared_optin())
            return violation(INVALID_VALUE, "%d bytes of shared memory are more than the device has", value);
        function->most_dynamic = size_t(value);
    } else if (attribute != 9) {
        return violation(INVALID_VALUE, "function attribute %d is not emulated", attribute);
    }
    return SUCCESS;
}

ENTRY cuLaunchKernel(void* handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared, void* stream_handle, void** arguments,
                     void** extra) {
    BEGIN;
    auto* function = static_cast<Function*>(handle);
    if (functions.count(function) == 0) return violation(INVALID_HANDLE, "a function that does not exist");
    const char* name = function->kernel->name;
    if (extra) return violation(INVALID_VALUE, "%s: arguments in a buffer are not emulated", name);
    uint64_t threads = uint64_t(block_x) * block_y * block_z;
    if (threads == 0 || threads > function->kernel->max_threads || block_z > 64)
        return violation(INVALID_VALUE, "%s: a block of %u x %u x %u, at most %u threads are allowed", name, block_x,
                         block_y, block_z, function->kernel->max_threads);
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_x > 0x7fffffffu || grid_y > 65535 || grid_z > 65535)
        return violation(INVALID_VALUE, "%s: a grid of %u x %u x %u", name, grid_x, grid_y, grid_z);
    if (shared > SHARED_BYTES && shared > function->most_dynamic)
        return violation(INVALID_VALUE, "%s: %u bytes of shared memory without asking for them", name, shared);
    Status status = SUCCESS;
    Stream* stream = stream_of(stream_handle, &status);
    if (status) return status;
    if (strikes("launch")) return OUT_OF_RESOURCES;
    Launch launch;
    launch.name = name;
    launch.bound = function->kernel->bind(arguments);
    launch.grid = {grid_x, grid_y, grid_z};
    launch.block = {block_x, block_y, block_z};
    launch.dynamic_shared = shared;
    launch.most_shared = function->most_dynamic > SHARED_BYTES ? shared_optin() : SHARED_BYTES;
    Operation operation;
    operation.name = name;
    operation.run = [launch] { return run_kernel(launch); };
    enqueue(stream, std::move(operation));
    return SUCCESS;
}

// ---- names of errors

namespace {
struct Named {
    Status status;
    const char *name, *text;
};
constexpr Named NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE", "the device is busy or unavailable"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the memory is registered already"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "the memory was not registered"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};
}  // namespace

ENTRY cuGetErrorName(Status status, const char** name) {
    *name = nullptr;
    for (const Named& named : NAMES)
        if (named.status == status) *name = named.name;
    return *name ? SUCCESS : INVALID_VALUE;
}

ENTRY cuGetErrorString(Status status, const char** text) {
    *text = nullptr;
    for (const Named& named : NAMES)
        if (named.status == status) *text = named.text;
    return *text ? SUCCESS : INVALID_VALUE;
}
