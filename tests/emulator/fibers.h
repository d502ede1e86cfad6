// The threads of a block as fibres, and what they do together.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "runtime.h"

namespace emulator {

struct Warp;

// A thread of the block that runs.
struct Thread {
    Index thread, block, block_size, grid_size;
    uint32_t lane;
    Warp* warp;
    uint32_t next_shared;  // of the shared arrays that it has asked for
};

extern EXPORT Thread* current;

EXPORT void sync_block(const char* place);
// Deposits some bytes and waits for all lanes of the warp; then the bytes of all lanes can be read until the lane's
// next deposit but one.
EXPORT const uint8_t* exchange(const void* bytes, size_t count, const char* what);
constexpr size_t EXCHANGE_BYTES = 64;
EXPORT void* shared_array(size_t bytes);
EXPORT void* dynamic_shared();
// Copies that land when they are waited for.
EXPORT void copy_async(void* to, const void* from, size_t bytes);
EXPORT void copy_async_commit();
EXPORT void copy_async_wait(uint32_t groups_left);

template <typename... A> Bound bind(void (*kernel)(A...), void** arguments) {
    std::tuple<std::remove_cv_t<A>...> values;
    Bound bound;
    auto take = [&](auto& value) {
        using T = std::remove_reference_t<decltype(value)>;
        std::memcpy(&value, *arguments++, sizeof(T));
        if constexpr (std::is_pointer_v<T>) {
            using To = std::remove_pointer_t<T>;
            if constexpr (std::is_void_v<To>) bound.pointers.push_back({value, 1});
            else bound.pointers.push_back({value, alignof(To)});
        }
    };
    std::apply([&](auto&... value) { (take(value), ...); }, values);
    bound.call = [kernel, values] { std::apply(kernel, values); };
    return bound;
}

struct Registration {
    Registration(const char* program, const char* name, uint32_t max_threads, Bound (*bind)(void**)) {
        add_kernel({program, name, max_threads, bind});
    }
};

}  // namespace emulator
