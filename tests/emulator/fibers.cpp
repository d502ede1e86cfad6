// Runs a kernel: block after block, every thread a fibre that is left at barriers and exchanges.
//
// Order of blocks, of warps and of lanes is drawn by chance, so that what depends on it shows.

#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif

namespace emulator {

Thread* current = nullptr;

// Saves what a call must preserve on the stack, and goes on where the other stack was left.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {

constexpr size_t STACK_BYTES = SANITIZED ? 512 << 10 : 128 << 10;
constexpr uint64_t STACK_MARK = 0x5374'6163'6b45'6e64;
constexpr uint32_t MOST_THREADS = 1024;
constexpr size_t SHARED_GUARD = 64;
constexpr size_t SHARED_ROOM = 512 << 10;

struct Fiber {
    uint8_t* stack;
    void* at;
    Thread* thread;
    void* fake_stack;
};

enum class State { Ready, AtBarrier, InExchange, Done };

struct Running {
    Thread thread;
    Fiber* fiber;
    State state;
    const char* place;
    std::vector<std::vector<std::tuple<void*, const void*, size_t>>> copies;  // groups, the open one last
};

struct Block {
    const Launch* launch;
    std::vector<Running> threads;
    std::vector<Warp> warps;
    std::deque<uint32_t> ready;
    uint32_t alive, at_barrier;
    // Shared arrays: where each begins, and how long it is.
    std::vector<std::pair<size_t, size_t>> shared;
    size_t shared_used, shared_asked;
};

Block block;
std::vector<Fiber*> idle_fibers;
Fiber* running_fiber;
void* scheduler_at;
uint8_t* shared_memory;
#if SANITIZED
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
#endif

Running& running() { return *reinterpret_cast<Running*>(current); }

void to_scheduler(bool done) {
#if SANITIZED
    __sanitizer_start_switch_fiber(done ? nullptr : &running_fiber->fake_stack, scheduler_stack, scheduler_stack_bytes);
#else
    (void)done;
#endif
    Fiber* self = running_fiber;
    emulator_switch(&self->at, scheduler_at);
#if SANITIZED
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// Every fibre's first and only function: calls the kernel for one thread after another.
void fiber_main() {
#if SANITIZED
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {
        block.launch->bound.call();
        running().state = State::Done;
        to_scheduler(false);
    }
}

Fiber* take_fiber() {
    if (!idle_fibers.empty()) {
        Fiber* fiber = idle_fibers.back();
        idle_fibers.pop_back();
        return fiber;
    }
    void* stack =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
        std::perror("tidemill emulator: stack of a fibre");
        std::abort();
    }
    auto* fiber = new Fiber{static_cast<uint8_t*>(stack), nullptr, nullptr, nullptr};
    std::memcpy(stack, &STACK_MARK, sizeof STACK_MARK);
    // What emulator_switch pops, the function that it returns to, and where that would return to; the stack is aligned
    // as after a call.
    auto* top = reinterpret_cast<uint64_t*>(fiber->stack + STACK_BYTES - 56);
    top[0] = 0;
    top[-1] = reinterpret_cast<uint64_t>(&fiber_main);
    for (int i = 2; i <= 7; i++) top[-i] = 0;
    fiber->at = top - 7;
    return fiber;
}

void switch_to(Running& thread) {
    if (!thread.fiber) thread.fiber = take_fiber();
    current = &thread.thread;
    running_fiber = thread.fiber;
#if SANITIZED
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.fiber->stack, STACK_BYTES);
#endif
    emulator_switch(&scheduler_at, thread.fiber->at);
#if SANITIZED
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    if (std::memcmp(thread.fiber->stack, &STACK_MARK, sizeof STACK_MARK) != 0) {
        std::fprintf(stderr, "tidemill emulator: a thread of %s needs too much stack\n", block.launch->name.c_str());
        std::abort();
    }
    if (thread.state == State::Done) {
        idle_fibers.push_back(thread.fiber);
        thread.fiber = nullptr;
    }
}

void wake(uint32_t index) {
    block.threads[index].state = State::Ready;
    block.ready.push_back(index);
}

void wake_barrier_if_full() {
    if (block.at_barrier == 0 || block.at_barrier < block.alive) return;
    block.at_barrier = 0;
    for (uint32_t i = 0; i < block.threads.size(); i++)
        if (block.threads[i].state == State::AtBarrier) wake(i);
}

[[noreturn]] void stuck() {
    std::fprintf(stderr, "tidemill emulator: a block of %s stands still:\n", block.launch->name.c_str());
    for (uint32_t i = 0; i < block.threads.size(); i++) {
        Running& thread = block.threads[i];
        if (thread.state != State::Done)
            std::fprintf(stderr, "  thread %u waits at %s\n", i, thread.place ? thread.place : "its start");
    }
    std::abort();
}

}  // namespace

struct Warp {
    uint32_t first, lanes, arrived, generation;
    const char* what;
    uint8_t bytes[2][32][EXCHANGE_BYTES];
};

void sync_block(const char* place) {
    Running& self = running();
    self.state = State::AtBarrier;
    self.place = place;
    block.at_barrier++;
    if (block.at_barrier == block.alive) wake_barrier_if_full();
    to_scheduler(false);
}

const uint8_t* exchange(const void* bytes, size_t count, const char* what) {
    Running& self = running();
    Warp& warp = *self.thread.warp;
    if (warp.arrived == 0) warp.what = what;
    if (std::strcmp(warp.what, what) != 0) {
        std::fprintf(stderr, "tidemill emulator: lanes of a warp of %s meet at %s and at %s\n",
                     block.launch->name.c_str(), warp.what, what);
        std::abort();
    }
    uint32_t generation = warp.generation;
    uint8_t* here = &warp.bytes[generation % 2][0][0];
    std::memcpy(here + self.thread.lane * EXCHANGE_BYTES, bytes, count);
    warp.arrived++;
    if (warp.arrived == warp.lanes) {
        warp.arrived = 0;
        warp.generation++;
        for (uint32_t i = 0; i < warp.lanes; i++)
            if (warp.first + i != uint32_t(&self - block.threads.data())) wake(warp.first + i);
    } else {
        self.state = State::InExchange;
        self.place = what;
        to_scheduler(false);
    }
    return here;
}

void* shared_array(size_t bytes) {
    Thread& self = *current;
    uint32_t index = self.next_shared++;
    if (index == block.shared.size()) {
        size_t start = block.shared_used + SHARED_GUARD;
        block.shared_used = (start + bytes + 15) / 16 * 16;
        block.shared_asked += (bytes + 15) / 16 * 16;
        block.shared.push_back({start, bytes});
        if (block.shared_used + SHARED_GUARD > SHARED_ROOM || block.shared_asked > block.launch->most_shared) {
            std::fprintf(stderr, "tidemill emulator: %s needs %zu bytes of shared memory and may have %zu\n",
                         block.launch->name.c_str(), block.shared_asked, block.launch->most_shared);
            std::abort();
        }
#if SANITIZED
        ASAN_UNPOISON_MEMORY_REGION(shared_memory + start, bytes);
#endif
        std::memset(shared_memory + start, POISON, bytes);
    }
    if (block.shared[index].second != bytes) {
        std::fprintf(stderr, "tidemill emulator: threads of %s ask for shared arrays in different orders\n",
                     block.launch->name.c_str());
        std::abort();
    }
    return shared_memory + block.shared[index].first;
}

void* dynamic_shared() { return shared_array(block.launch->dynamic_shared); }

void copy_async(void* to, const void* from, size_t bytes) {
    auto& copies = running().copies;
    if (copies.empty()) copies.emplace_back();
    // Whoever reads too early finds poison.
    std::memset(to, POISON, bytes);
    copies.back().push_back({to, from, bytes});
}

void copy_async_commit() {
    auto& copies = running().copies;
    if (copies.empty()) copies.emplace_back();
    copies.emplace_back();
}

void copy_async_wait(uint32_t groups_left) {
    auto& copies = running().copies;
    // The last group is open: it has not been committed.
    while (copies.size() > 1 + size_t(groups_left)) {
        for (auto& [to, from, bytes] : copies.front()) std::memcpy(to, from, bytes);
        copies.erase(copies.begin());
    }
}

namespace {

Status check_shared() {
    size_t at = 0;
    auto damaged = [&](size_t end) {
        for (; at < end; at++)
            if (shared_memory[at] != uint8_t(~POISON)) return true;
        return false;
    };
    for (auto [start, bytes] : block.shared) {
        if (damaged(start))
            return violation(ILLEGAL_ADDRESS, "%s writes outside of its shared memory", block.launch->name.c_str());
        at = start + bytes;
    }
    if (damaged(block.shared_used + SHARED_GUARD))
        return violation(ILLEGAL_ADDRESS, "%s writes past its shared memory", block.launch->name.c_str());
    return SUCCESS;
}

Status run_block(const Launch& launch, Index index) {
    uint32_t count = launch.block.x * launch.block.y * launch.block.z;
    block.launch = &launch;
    block.threads.resize(count);
    block.warps.resize((count + 31) / 32);
    block.ready.clear();
    block.alive = count;
    block.at_barrier = 0;
    size_t used = block.shared_used + SHARED_GUARD;
#if SANITIZED
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, SHARED_ROOM);
#endif
    std::memset(shared_memory, uint8_t(~POISON), used);
    block.shared.clear();
    block.shared_used = block.shared_asked = 0;
#if SANITIZED
    ASAN_POISON_MEMORY_REGION(shared_memory, SHARED_ROOM);
#endif
    std::vector<uint32_t> order(block.warps.size());
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[chance(uint32_t(i))]);
    bool backward = chance(2);
    for (uint32_t warp : order) {
        uint32_t first = warp * 32, lanes = std::min(32u, count - first);
        Warp& state = block.warps[warp];
        state.first = first;
        state.lanes = lanes;
        state.arrived = 0;
        state.generation = 0;
        for (uint32_t i = 0; i < lanes; i++) {
            uint32_t lane = backward ? lanes - 1 - i : i, linear = first + lane;
            Running& thread = block.threads[linear];
            Index within = {linear % launch.block.x, linear / launch.block.x % launch.block.y,
                            linear / launch.block.x / launch.block.y};
            thread.thread = {within, index, launch.block, launch.grid, lane, &state, 0};
            thread.fiber = nullptr;
            thread.state = State::Ready;
            thread.place = nullptr;
            thread.copies.clear();
            block.ready.push_back(linear);
        }
    }
    while (block.alive > 0) {
        if (block.ready.empty()) stuck();
        Running& thread = block.threads[block.ready.front()];
        block.ready.pop_front();
        switch_to(thread);
        if (thread.state == State::Done) {
            block.alive--;
            for (auto& group : thread.copies)
                if (!group.empty())
                    return violation(LAUNCH_FAILED, "%s ends with copies that nobody waited for", launch.name.c_str());
            wake_barrier_if_full();
        }
    }
#if SANITIZED
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, SHARED_ROOM);
#endif
    return check_shared();
}

}  // namespace

Status run_kernel(const Launch& launch) {
    if (!shared_memory) {
        shared_memory = static_cast<uint8_t*>(std::aligned_alloc(4096, SHARED_ROOM));
        std::memset(shared_memory, uint8_t(~POISON), SHARED_ROOM);
    }
    for (auto& [pointer, alignment] : launch.bound.pointers) {
        if (pointer && !is_device(pointer, 1) && !is_mapped(pointer))
            return violation(ILLEGAL_ADDRESS, "%s gets a pointer that is not of the device", launch.name.c_str());
        if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
            return violation(ILLEGAL_ADDRESS, "%s gets a misaligned pointer", launch.name.c_str());
    }
    uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    // Some way through all blocks: a start, and a step that has no common divisor with their number.
    uint64_t step = 1, start = chance(uint32_t(std::min<uint64_t>(blocks, 1u << 30)));
    if (blocks > 2) {
        do step = 1 + chance(uint32_t(std::min<uint64_t>(blocks - 1, 1u << 30)));
        while (std::gcd(step, blocks) != 1);
    }
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t linear = (start + i * step) % blocks;
        Index index = {uint32_t(linear % launch.grid.x), uint32_t(linear / launch.grid.x % launch.grid.y),
                       uint32_t(linear / launch.grid.x / launch.grid.y)};
        if (Status status = run_block(launch, index)) return status;
    }
    return check_guards(launch.name.c_str());
}

namespace {
std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}
}  // namespace

void add_kernel(const Kernel& kernel) { kernels().push_back(kernel); }

const Kernel* find_kernel(const std::string& program, const std::string& name) {
    for (const Kernel& kernel : kernels())
        if (program == kernel.program && name == kernel.name) return &kernel;
    return nullptr;
}

bool has_program(const std::string& program) {
    return std::any_of(kernels().begin(), kernels().end(), [&](const Kernel& k) { return program == k.program; });
}

}  // namespace emulator
