// Streams are queues. What runs next is drawn by chance among the streams whose first operation may run, and only when
// somebody calls: so everything is as late as events and waiting allow, or earlier, as the seed wants.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>

#include "runtime.h"

namespace emulator {

namespace {

// In the order of their making, so that a seed means the same in every run.
std::vector<Stream*> streams;
std::set<Event*> events;
// Ended events that operations may still name.
std::vector<std::unique_ptr<Event>> ended;
Status error;

std::mt19937& generator() {
    static std::mt19937 generator(uint32_t(number_from("TIDEMILL_EMULATOR_SEED", 0)) * 2654435761u + 1);
    return generator;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool may_run(const Stream* stream) {
    if (stream->queue.empty()) return false;
    const Operation& first = stream->queue.front();
    return !first.wait || first.wait->completed >= first.ticket;
}

}  // namespace

uint32_t chance(uint32_t below) { return below > 1 ? generator()() % below : 0; }

Status broken() { return error; }

bool strikes(const char* kind) {
    static const std::string fault = [] {
        const char* text = std::getenv("TIDEMILL_EMULATOR_FAULT");
        return std::string(text ? text : "");
    }();
    static int64_t left = [] {
        size_t colon = fault.find(':');
        return colon == std::string::npos ? 0 : std::atoll(fault.c_str() + colon + 1);
    }();
    if (fault.substr(0, fault.find(':')) != kind) return false;
    return left-- == 0;
}

namespace {

Stream* make_stream(uint32_t number) {
    auto* stream = new Stream;
    stream->number = number;
    streams.push_back(stream);
    return stream;
}

FILE* trace() {
    static FILE* file = [] {
        const char* path = std::getenv("TIDEMILL_EMULATOR_TRACE");
        return path ? std::fopen(path, "a") : nullptr;
    }();
    return file;
}

// An operation runs that does something; beside it, so many other streams might run.
void trace_run(const Stream* stream, const Operation& operation, size_t beside) {
    if (!trace()) return;
    std::fprintf(trace(), "run %u %zu %s\n", stream->number, beside, operation.name.c_str());
    std::fflush(trace());
}

}  // namespace

void trace_wait(const char* call) {
    if (!trace()) return;
    std::fprintf(trace(), "wait %s\n", call);
    std::fflush(trace());
}

Stream* new_stream() {
    static uint32_t made = 0;
    return make_stream(++made);
}

Stream* default_stream() {
    static Stream* stream = make_stream(0);
    return stream;
}

bool is_deaf(const Stream* stream) {
    static const int64_t deaf = [] {
        const char* fault = std::getenv("TIDEMILL_EMULATOR_FAULT");
        return fault && std::strncmp(fault, "deaf:", 5) == 0 ? std::atoll(fault + 5) : -1;
    }();
    return stream->number == deaf;
}

bool is_stream(const Stream* stream) { return std::find(streams.begin(), streams.end(), stream) != streams.end(); }

Status end_stream(Stream* stream) {
    if (Status status = finish(stream)) return status;
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return SUCCESS;
}

Event* new_event(bool timing) {
    auto* event = new Event;
    event->timing = timing;
    events.insert(event);
    return event;
}

bool is_event(const Event* event) { return events.count(const_cast<Event*>(event)) > 0; }

Status end_event(Event* event) {
    events.erase(event);
    ended.emplace_back(event);
    return SUCCESS;
}

void enqueue(Stream* stream, Operation operation) { stream->queue.push_back(std::move(operation)); }

bool run_one() {
    if (error) return false;
    std::vector<Stream*> ready;
    std::copy_if(streams.begin(), streams.end(), std::back_inserter(ready), may_run);
    if (ready.empty()) return false;
    Stream* stream = ready[chance(uint32_t(ready.size()))];
    Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (operation.run) {
        trace_run(stream, operation, ready.size() - 1);
        if (strikes("ecc")) error = ECC_UNCORRECTABLE;
        else if (strikes("lost")) error = UNAVAILABLE;
        else error = operation.run();
    }
    if (operation.record) {
        operation.record->completed = std::max(operation.record->completed, operation.ticket);
        operation.record->time = now();
    }
    return true;
}

void run_some() {
    // Now and then the device is quick, or does nothing for a while.
    static uint32_t quickness = 0, calls = 0;
    if (calls++ % 16 == 0) quickness = chance(3);
    while (quickness > 0 && chance(3) < quickness && run_one()) {}
}

Status finish(Stream* stream) {
    while (!stream->queue.empty() && !error)
        if (!run_one()) return violation(LAUNCH_FAILED, "a stream waits for an event that nothing will record");
    return error;
}

Status finish_all() {
    for (;;) {
        auto busy = std::find_if(streams.begin(), streams.end(), [](Stream* s) { return !s->queue.empty(); });
        if (busy == streams.end() || error) return error;
        if (Status status = finish(*busy)) return status;
    }
}

}  // namespace emulator
