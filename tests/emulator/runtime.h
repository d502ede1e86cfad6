// The emulated device: memory with guards and poison, threads of a block as fibres, streams as queues.
//
// Everything here is used under one lock (`Lock`), whichever host thread calls: kernels run on the thread that waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#define EXPORT __attribute__((visibility("default")))

namespace emulator {

using Status = int;
constexpr Status SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, UNAVAILABLE = 46,
                 NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
                 ECC_UNCORRECTABLE = 214, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
                 OUT_OF_RESOURCES = 701, LAUNCH_FAILED = 719;

// Held by every entry point.
struct EXPORT Lock {
    Lock();
    ~Lock();
};

// A broken contract: says so and ends the process, or, with TIDEMILL_EMULATOR_CONTRACT=report, gives `status`.
EXPORT Status violation(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// A number from an environment variable.
EXPORT uint64_t number_from(const char* variable, uint64_t otherwise);

// The schedule's source of chance, seeded by TIDEMILL_EMULATOR_SEED.
EXPORT uint32_t chance(uint32_t below);

// ---- memory

constexpr uint8_t POISON = 0xff;

EXPORT Status allocate(size_t bytes, void** address);
EXPORT Status release(void* address);
EXPORT size_t allocated_bytes();
EXPORT size_t memory_bytes();
// Whether a range lies within one allocation of the device; null tells nothing and is not within.
EXPORT bool is_device(const void* address, size_t bytes);
// Bytes from an address to the end of its allocation; 0 outside.
EXPORT size_t room_at(const void* address);
// Reports writes outside of allocations, as done by `by`.
EXPORT Status check_guards(const char* by);

EXPORT Status pin(void* address, size_t bytes, bool allocated, bool mapped);
EXPORT Status unpin(void* address, bool allocated);
EXPORT bool is_pinned(const void* address, size_t bytes);
// Whether kernels may read and write a byte of main memory.
EXPORT bool is_mapped(const void* address);
// Whether a range touches pinned memory at all.
EXPORT bool touches_pinned(const void* address, size_t bytes);

// ---- kernels

struct Index {
    uint32_t x, y, z;
};

struct Argument {
    const void* pointer;
    size_t alignment;
};

// A kernel with its arguments, as every thread calls it.
struct Bound {
    std::function<void()> call;
    std::vector<Argument> pointers;
};

struct Kernel {
    const char* program;
    const char* name;
    uint32_t max_threads;
    Bound (*bind)(void** arguments);
};

EXPORT void add_kernel(const Kernel& kernel);
EXPORT const Kernel* find_kernel(const std::string& program, const std::string& name);
EXPORT bool has_program(const std::string& program);

struct Launch {
    std::string name;
    Bound bound;
    Index grid, block;
    size_t dynamic_shared, most_shared;
};

// Runs all blocks, in an order drawn by chance.
EXPORT Status run_kernel(const Launch& launch);

// ---- streams

struct Event {
    bool timing = false;
    uint64_t recorded = 0, completed = 0;
    double time = 0.0;
};

struct Operation {
    std::string name;
    std::function<Status()> run;
    Event* wait = nullptr;
    Event* record = nullptr;
    uint64_t ticket = 0;
};

struct Stream {
    // In the order of their making, from 1; the default stream is 0.
    uint32_t number = 0;
    std::deque<Operation> queue;
};

EXPORT Stream* new_stream();
EXPORT Status end_stream(Stream* stream);
EXPORT bool is_stream(const Stream* stream);
EXPORT Stream* default_stream();
EXPORT Event* new_event(bool timing);
EXPORT Status end_event(Event* event);
EXPORT bool is_event(const Event* event);
EXPORT void enqueue(Stream* stream, Operation operation);
// Some operations that may run, or none: called at every entry.
EXPORT void run_some();
// Runs one operation of any stream; false if none can run.
EXPORT bool run_one();
EXPORT Status finish(Stream* stream);
EXPORT Status finish_all();
// Notes in the trace (TIDEMILL_EMULATOR_TRACE) that the host waits, or would, if there is something to wait for.
EXPORT void trace_wait(const char* call);
// Whether the stream is the one that TIDEMILL_EMULATOR_FAULT=deaf:NUMBER keeps from waiting for events.
EXPORT bool is_deaf(const Stream* stream);
// The error that every call gives from now on, if there is one.
EXPORT Status broken();
// Counts an event of a kind (oom, launch, ecc, lost); true when it is the one at which TIDEMILL_EMULATOR_FAULT strikes.
EXPORT bool strikes(const char* kind);

}  // namespace emulator
