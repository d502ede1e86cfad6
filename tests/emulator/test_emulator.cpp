// test_emulator FOLDER: what is wrong must show. FOLDER holds common.cuh and faulty.cu.
//
// Mistakes that break a contract end the process, so each of those runs in a child. Mistakes of order show in results
// for some seeds, and the right order for none.

#include <sys/wait.h>
#include <unistd.h>

#include <functional>

#include "harness.h"

namespace {

std::string folder;

// How a child that does this ends: 0 well, 1 with a wrong result, 2 stopped by the emulator.
int outcome(u32 seed, const std::function<bool(Device&)>& act) {
    std::fflush(nullptr);
    pid_t child = fork();
    if (child == 0) {
        setenv("TIDEMILL_EMULATOR_SEED", std::to_string(seed).c_str(), 1);
        check(std::freopen("/dev/null", "w", stderr) != nullptr, "no /dev/null");
        Device device(folder);
        _exit(act(device) ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? 2 : WEXITSTATUS(status);
}

constexpr u32 SEEDS = 40;

// Of many seeds, how many end in each way.
struct Counts {
    u32 good = 0, wrong = 0, stopped = 0;
};
Counts over_seeds(const std::function<bool(Device&)>& act) {
    Counts counts;
    for (u32 seed = 0; seed < SEEDS; seed++) {
        int how = outcome(seed, act);
        (how == 0 ? counts.good : how == 1 ? counts.wrong : counts.stopped)++;
    }
    return counts;
}

void report(const char* what, const Counts& c, bool holds) {
    std::printf("%-46s good %2u, wrong %2u, stopped %2u\n", what, c.good, c.wrong, c.stopped);
    check(holds, what);
}

bool all_are(const std::vector<float>& values, float wanted) {
    for (float value : values)
        if (value != wanted) return false;
    return true;
}

constexpr u32 COUNT = 64;
constexpr size_t BYTES = COUNT * sizeof(float);

// A kernel that fills 64 floats with 1.
std::function<bool(Device&)> fills(const char* kernel) {
    return [kernel](Device& device) {
        float* out = device.room<float>(COUNT);
        device.launch("faulty.cu", kernel, {1, 1, COUNT, 0}, out);
        return all_are(device.download(out, COUNT), 1.0f);
    };
}
std::function<bool(Device&)> fills_counted(const char* kernel, u32 count) {
    return [kernel, count](Device& device) {
        float* out = device.room<float>(COUNT);
        device.launch("faulty.cu", kernel, {1, 1, COUNT, 0}, out, count);
        return all_are(device.download(out, COUNT), 1.0f);
    };
}

float* pinned_floats(size_t count) {
    void* memory = nullptr;
    driver(cuMemHostAlloc(&memory, count * sizeof(float), 0));
    return static_cast<float*>(memory);
}

// Copies in on one stream, adds nothing but copies within the device on another, behind an event or not.
std::function<bool(Device&)> two_streams(bool waits) {
    return [waits](Device& device) {
        void *second = nullptr, *event = nullptr;
        driver(cuStreamCreate(&second, 1));
        driver(cuEventCreate(&event, 2));
        float* from = pinned_floats(4 * COUNT);
        for (u32 i = 0; i < 4 * COUNT; i++) from[i] = 1.0f;
        float *in = device.room<float>(4 * COUNT), *out = device.room<float>(COUNT);
        driver(cuMemcpyHtoDAsync_v2(reinterpret_cast<u64>(in), from, 4 * BYTES, device.stream));
        driver(cuEventRecord(event, device.stream));
        if (waits) driver(cuStreamWaitEvent(second, event, 0));
        void* first = device.stream;
        device.stream = second;
        device.launch("faulty.cu", "copy_through", {1, 1, COUNT, 0}, static_cast<const float*>(in), out, 0u);
        driver(cuStreamSynchronize(second));
        driver(cuStreamSynchronize(first));
        return all_are(device.download(out, COUNT), 1.0f);
    };
}

// Main memory that a copy reads is written again: after the copy's event, or at once.
std::function<bool(Device&)> slot_again(bool waits) {
    return [waits](Device& device) {
        void* event = nullptr;
        driver(cuEventCreate(&event, 2));
        float* slot = pinned_floats(COUNT);
        float* out = device.room<float>(COUNT);
        for (u32 i = 0; i < COUNT; i++) slot[i] = 1.0f;
        driver(cuMemcpyHtoDAsync_v2(reinterpret_cast<u64>(out), slot, BYTES, device.stream));
        driver(cuEventRecord(event, device.stream));
        if (waits) driver(cuEventSynchronize(event));
        for (u32 i = 0; i < COUNT; i++) slot[i] = 2.0f;
        return all_are(device.download(out, COUNT), 1.0f);
    };
}

// Results are read in main memory before, or after, the copy out is over.
std::function<bool(Device&)> read_result(bool waits) {
    return [waits](Device& device) {
        float* in = device.upload(std::vector<float>(COUNT, 1.0f));
        float* result = pinned_floats(COUNT);
        driver(cuMemcpyDtoHAsync_v2(result, reinterpret_cast<u64>(in), BYTES, device.stream));
        if (waits) driver(cuStreamSynchronize(device.stream));
        bool right = all_are(std::vector<float>(result, result + COUNT), 1.0f);
        driver(cuStreamSynchronize(device.stream));
        return right;
    };
}

std::function<bool(Device&)> copies(bool early) {
    return [early](Device& device) {
        float *in = device.upload(std::vector<float>(4 * COUNT, 1.0f)), *out = device.room<float>(COUNT);
        device.launch("faulty.cu", "copy_through", {1, 1, COUNT, 0}, static_cast<const float*>(in), out, u32(early));
        return all_are(device.download(out, COUNT), 1.0f);
    };
}

// Calls whose contract is broken.
std::function<bool(Device&)> breaks(const std::function<void(Device&)>& act) {
    return [act](Device& device) {
        act(device);
        return true;
    };
}

}  // namespace

int main(int, char** arguments) {
    folder = arguments[1];
    auto always_good = [](const Counts& c) { return c.good == SEEDS; };
    auto always_stopped = [](const Counts& c) { return c.stopped == SEEDS; };
    auto always_wrong = [](const Counts& c) { return c.wrong == SEEDS; };
    auto sometimes_wrong = [](const Counts& c) { return c.wrong > 0 && c.stopped == 0; };
    auto test = [](const char* what, const std::function<bool(Device&)>& act,
                   const std::function<bool(const Counts&)>& holds) {
        Counts counts = over_seeds(act);
        report(what, counts, holds(counts));
    };

    test("an event waited for", two_streams(true), always_good);
    test("an event not waited for", two_streams(false), sometimes_wrong);
    test("a slot used again after its event", slot_again(true), always_good);
    test("a slot used again at once", slot_again(false), sometimes_wrong);
    test("a result read after its stream", read_result(true), always_good);
    test("a result read at once", read_result(false), sometimes_wrong);
    test("copies waited for in a kernel", copies(false), always_good);
    test("copies read before they are waited for", copies(true), always_wrong);
    test("all elements written", fills_counted("leave_one", COUNT + 1), always_good);
    test("an element left unwritten", fills_counted("leave_one", COUNT), always_wrong);
    test("shared memory left unwritten", fills("read_shared_unwritten"), always_wrong);
    test("a missing barrier", fills("miss_barrier"), sometimes_wrong);
    test("all elements and no more", fills_counted("overrun", COUNT), always_good);
    test("one element too many", fills_counted("overrun", COUNT + 1), always_stopped);
    test("one element too many in shared memory", fills("overrun_shared"), always_stopped);
    test("a shuffle that a lane never reaches", fills("leave_early"), always_stopped);
    test("an asynchronous copy of pageable memory", breaks([](Device& device) {
             std::vector<float> pageable(COUNT);
             cuMemcpyHtoDAsync_v2(device.allocate(BYTES), pageable.data(), BYTES, device.stream);
         }),
         always_stopped);
    test("a copy past an allocation", breaks([](Device& device) {
             cuMemcpyHtoDAsync_v2(device.allocate(BYTES) + 4, pinned_floats(COUNT), BYTES, device.stream);
         }),
         always_stopped);
    test("an event waited for that was never recorded", breaks([](Device& device) {
             void* event = nullptr;
             driver(cuEventCreate(&event, 2));
             cuStreamWaitEvent(device.stream, event, 0);
         }),
         always_stopped);
    test("no current context", breaks([](Device& device) {
             driver(cuCtxSetCurrent(nullptr));
             cuStreamSynchronize(device.stream);
         }),
         always_stopped);
    test("a block that is too large", breaks([](Device& device) {
             device.launch("faulty.cu", "overrun", {1, 1, 96, 0}, device.room<float>(COUNT), COUNT);
         }),
         always_stopped);
    test("a pointer of main memory for a kernel", breaks([](Device& device) {
             std::vector<float> main(COUNT);
             device.launch("faulty.cu", "overrun", {1, 1, COUNT, 0}, main.data(), COUNT);
             cuStreamSynchronize(device.stream);
         }),
         always_stopped);
    test("a program that was not built", breaks([](Device&) {
             void* module = nullptr;
             cuModuleLoadData(&module, "tidemill-emulated 1-1");
         }),
         always_stopped);

    // Injected errors.
    auto fault = [](const char* kind, int wanted, const std::function<int(Device&)>& act) {
        setenv("TIDEMILL_EMULATOR_FAULT", kind, 1);
        Counts counts = over_seeds([&](Device& device) { return act(device) == wanted; });
        unsetenv("TIDEMILL_EMULATOR_FAULT");
        report(kind, counts, counts.good == SEEDS);
    };
    fault("oom:1", 2, [](Device& device) {
        device.allocate(BYTES);
        u64 address = 0;
        return cuMemAlloc_v2(&address, BYTES);
    });
    auto launches = [](Device& device) {
        float* out = device.room<float>(COUNT);
        u32 count = COUNT;
        void* parameters[] = {&out, &count};
        int status = 0;
        for (int i = 0; i < 5 && status == 0; i++) {
            status = cuLaunchKernel(device.function("faulty.cu", "overrun"), 1, 1, 1, COUNT, 1, 1, 0, device.stream,
                                    parameters, nullptr);
            if (status == 0) status = cuStreamSynchronize(device.stream);
        }
        // Errors of the device stay.
        if (status == 214 || status == 46) check(cuStreamSynchronize(device.stream) == status, "an error that stays");
        return status;
    };
    fault("launch:2", 701, launches);
    fault("ecc:2", 214, launches);
    fault("lost:2", 46, launches);
    std::printf("the emulator notices all of these\n");
    return 0;
}
