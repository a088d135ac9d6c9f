// Streams and events. Work waits in its stream until somebody waits for it: a program that does not
// wait where it must, or waits for another stream, sees memory as it was before.

#include <deque>
#include <map>
#include <memory>

#include "runtime.h"

namespace cuda_on_host {
namespace {
struct Stream {
    std::deque<std::function<std::string()>> work;
    uint64_t issued = 0, done = 0;
};
using Shared = std::shared_ptr<Stream>;

struct Event {
    Shared stream;
    uint64_t at = 0; // done when its stream has done so much
};

// Never destroyed: threads may end after the statics.
auto& streams = *new std::map<void*, Shared>;
auto& unreported = *new std::string;

void run_until(Stream& stream, uint64_t at) {
    while (stream.done < at) {
        auto work = std::move(stream.work.front());
        stream.work.pop_front();
        std::string fault = work();
        stream.done++;
        if (!fault.empty() && unreported.empty()) unreported = fault;
    }
}

/// Whether a thread's own stream is gone: destructors of other thread-local values may come later.
thread_local bool ended = false;

/// A thread's own stream does its work when the thread ends, if not before.
struct PerThread {
    Shared stream = std::make_shared<Stream>();
    ~PerThread() {
        std::lock_guard lock(mutex);
        std::string of_others = std::move(unreported);
        unreported.clear();
        run_until(*stream, stream->issued);
        if (!unreported.empty()) fprintf(stderr, "cuda on host: nobody saw this error: %s\n", unreported.c_str());
        unreported = of_others;
        streams.erase(this);
        ended = true;
    }
};

Shared stream_of(void* handle) {
    void* const per_thread = reinterpret_cast<void*>(2); // CU_STREAM_PER_THREAD
    if (handle == per_thread && ended) {
        static const Shared of_ended_threads = std::make_shared<Stream>();
        return of_ended_threads;
    }
    if (handle == per_thread) {
        static thread_local PerThread own;
        return streams[&own] = own.stream;
    }
    Shared& stream = streams[handle];
    if (!stream) stream = std::make_shared<Stream>();
    return stream;
}

/// As on a GPU, the fault of earlier work is the error of whoever waits.
Result report() {
    count("synchronizations");
    if (unreported.empty()) return SUCCESS;
    std::string fault = std::move(unreported);
    unreported.clear();
    return complain(LAUNCH_FAILED, fault);
}
} // namespace

void enqueue(void* handle, std::function<std::string()> work) {
    static const bool at_once = getenv("CUDA_ON_HOST_AT_ONCE");
    Shared stream = stream_of(handle);
    stream->work.push_back(std::move(work));
    stream->issued++;
    if (at_once) run_until(*stream, stream->issued);
}

Result wait_for_stream(void* handle) {
    Shared stream = stream_of(handle);
    run_until(*stream, stream->issued);
    return report();
}

Result wait_for_all() {
    for (auto& [handle, stream] : std::map(streams)) run_until(*stream, stream->issued);
    return report();
}
} // namespace cuda_on_host

using namespace cuda_on_host;

API Result cuCtxSynchronize() { LOCK_AND_CHECK_CONTEXT; return wait_for_all(); }
API Result cuStreamCreate(void** out, unsigned) { *out = new char; return SUCCESS; }
API Result cuStreamCreateWithPriority(void** out, unsigned, int) { *out = new char; return SUCCESS; }
API Result cuStreamDestroy_v2(void* handle) {
    std::lock_guard lock(mutex);
    Shared stream = stream_of(handle);
    run_until(*stream, stream->issued);
    streams.erase(handle);
    delete static_cast<char*>(handle);
    return SUCCESS;
}
API Result cuStreamSynchronize(void* handle) { LOCK_AND_CHECK_CONTEXT; return wait_for_stream(handle); }
API Result cuStreamIsCapturing(void*, int* out) { *out = 0; return SUCCESS; }
API Result cuStreamWaitEvent(void* handle, void* event, unsigned) {
    LOCK_AND_CHECK_CONTEXT;
    enqueue(handle, [event = *static_cast<Event*>(event)] {
        if (event.stream) run_until(*event.stream, event.at);
        return "";
    });
    return SUCCESS;
}
API Result cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    LOCK_AND_CHECK_CONTEXT;
    enqueue(handle, [=] { return function(data), ""; });
    return SUCCESS;
}

API Result cuEventCreate(void** out, unsigned) { *out = new Event; return SUCCESS; }
API Result cuEventDestroy_v2(void* event) { delete static_cast<Event*>(event); return SUCCESS; }
API Result cuEventRecord(void* event, void* handle) {
    LOCK_AND_CHECK_CONTEXT;
    Shared stream = stream_of(handle);
    *static_cast<Event*>(event) = {stream, stream->issued};
    return SUCCESS;
}
// Each question lets one more piece of work be done, so that who asks in a loop comes to an end.
API Result cuEventQuery(void* of) {
    LOCK_AND_CHECK_CONTEXT;
    auto& event = *static_cast<Event*>(of);
    if (!event.stream || event.stream->done >= event.at) return SUCCESS;
    run_until(*event.stream, event.stream->done + 1);
    return NOT_READY;
}
API Result cuEventSynchronize(void* of) {
    LOCK_AND_CHECK_CONTEXT;
    auto& event = *static_cast<Event*>(of);
    if (event.stream) run_until(*event.stream, event.at);
    return report();
}
API Result cuEventElapsedTime(float* out, void*, void*) { *out = 0; return SUCCESS; }
API Result cuEventElapsedTime_v2(float* out, void*, void*) { *out = 0; return SUCCESS; }
