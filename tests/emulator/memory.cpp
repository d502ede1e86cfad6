// Memory of the device, and main memory that is pinned.
//
// An allocation lies between guards, at an address that is a multiple of 512 and no more; what is fresh or freed is
// poisoned. A freed allocation keeps its addresses, so that nothing else is found there.

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define HIDE(from, bytes) ASAN_POISON_MEMORY_REGION(from, bytes)
#define SHOW(from, bytes) ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#else
#define HIDE(from, bytes)
#define SHOW(from, bytes)
#endif

namespace emulator {

namespace {

constexpr size_t GUARD = 512;
constexpr uint8_t GUARD_BYTE = 0xa5;

struct Allocation {
    size_t bytes;
    size_t mapped;
};

std::map<uintptr_t, Allocation> allocations;
// Pinned ranges by where they begin.
struct Pinned {
    size_t bytes;
    bool allocated, mapped;
};
std::map<uintptr_t, Pinned> pinned;
size_t used;
std::mutex mutex;

// The allocation that an address lies in.
std::map<uintptr_t, Allocation>::iterator find(const void* address) {
    auto at = reinterpret_cast<uintptr_t>(address);
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) return allocations.end();
    auto found = std::prev(next);
    return at < found->first + found->second.bytes ? found : allocations.end();
}

}  // namespace

Lock::Lock() { mutex.lock(); }
Lock::~Lock() { mutex.unlock(); }

Status violation(Status status, const char* format, ...) {
    std::fprintf(stderr, "tidemill emulator: ");
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    const char* mode = std::getenv("TIDEMILL_EMULATOR_CONTRACT");
    if (mode && std::strcmp(mode, "report") == 0) return status;
    std::abort();
}

uint64_t number_from(const char* variable, uint64_t otherwise) {
    const char* text = std::getenv(variable);
    return text && *text ? std::strtoull(text, nullptr, 10) : otherwise;
}

size_t memory_bytes() { return number_from("TIDEMILL_EMULATOR_MEMORY_MIB", 2048) << 20; }

size_t allocated_bytes() { return used; }

Status allocate(size_t bytes, void** address) {
    if (bytes == 0) return violation(INVALID_VALUE, "an allocation of no bytes");
    if (strikes("oom") || bytes > memory_bytes() - used) return OUT_OF_MEMORY;
    size_t mapped = (bytes + 2 * GUARD + 4095) / 4096 * 4096;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return OUT_OF_MEMORY;
    uint8_t* start = static_cast<uint8_t*>(base) + GUARD;
    std::memset(base, GUARD_BYTE, mapped);
    std::memset(start, POISON, bytes);
    HIDE(base, GUARD);
    HIDE(start + bytes, mapped - GUARD - bytes);
    allocations[reinterpret_cast<uintptr_t>(start)] = {bytes, mapped};
    used += bytes;
    *address = start;
    return SUCCESS;
}

Status check_guards(const char* by) {
    for (auto& [start, allocation] : allocations) {
        auto* at = reinterpret_cast<uint8_t*>(start);
        SHOW(at - GUARD, allocation.mapped);
        auto intact = [](const uint8_t* from, const uint8_t* to) {
            while (from < to)
                if (*from++ != GUARD_BYTE) return false;
            return true;
        };
        bool whole = intact(at - GUARD, at) && intact(at + allocation.bytes, at - GUARD + allocation.mapped);
        HIDE(at - GUARD, GUARD);
        HIDE(at + allocation.bytes, allocation.mapped - GUARD - allocation.bytes);
        if (!whole) return violation(ILLEGAL_ADDRESS, "%s writes outside of its memory", by);
    }
    return SUCCESS;
}

Status release(void* address) {
    auto found = allocations.find(reinterpret_cast<uintptr_t>(address));
    if (found == allocations.end()) return violation(INVALID_VALUE, "an address is freed that was not allocated");
    auto [bytes, mapped] = found->second;
    if (Status status = check_guards("something")) return status;
    // The addresses stay taken: whoever still uses them is told so by the system.
    mprotect(static_cast<uint8_t*>(address) - GUARD, mapped, PROT_NONE);
    madvise(static_cast<uint8_t*>(address) - GUARD, mapped, MADV_DONTNEED);
    allocations.erase(found);
    used -= bytes;
    return SUCCESS;
}

bool is_device(const void* address, size_t bytes) { return bytes <= room_at(address); }

size_t room_at(const void* address) {
    auto found = find(address);
    if (found == allocations.end()) return 0;
    return found->first + found->second.bytes - reinterpret_cast<uintptr_t>(address);
}

Status pin(void* address, size_t bytes, bool allocated, bool mapped) {
    if (bytes == 0) return violation(INVALID_VALUE, "no bytes are pinned");
    if (touches_pinned(address, bytes)) return violation(712, "memory is pinned twice");
    pinned[reinterpret_cast<uintptr_t>(address)] = {bytes, allocated, mapped};
    return SUCCESS;
}

Status unpin(void* address, bool allocated) {
    auto found = pinned.find(reinterpret_cast<uintptr_t>(address));
    if (found == pinned.end() || found->second.allocated != allocated)
        return violation(713, "memory is given back that was not pinned so");
    pinned.erase(found);
    return SUCCESS;
}

bool is_pinned(const void* address, size_t bytes) {
    auto at = reinterpret_cast<uintptr_t>(address);
    auto next = pinned.upper_bound(at);
    if (next == pinned.begin()) return false;
    auto found = std::prev(next);
    return at + bytes <= found->first + found->second.bytes;
}

bool is_mapped(const void* address) {
    auto next = pinned.upper_bound(reinterpret_cast<uintptr_t>(address));
    return is_pinned(address, 1) && std::prev(next)->second.mapped;
}

bool touches_pinned(const void* address, size_t bytes) {
    auto at = reinterpret_cast<uintptr_t>(address);
    auto next = pinned.lower_bound(at + bytes);
    if (next == pinned.begin()) return false;
    auto found = std::prev(next);
    return found->first + found->second.bytes > at;
}

}  // namespace emulator
