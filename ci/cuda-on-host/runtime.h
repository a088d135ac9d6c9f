// What the parts of the stand-in driver share.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <mutex>
#include <string>

#include "shim.h"

#define API extern "C" __attribute__((visibility("default")))

namespace cuda_on_host {
using Result = int; // CUresult
enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
};

/// Held in every call that touches what is shared.
extern std::recursive_mutex mutex;
extern thread_local void* current_context;

/// Remembers the text, for cuGetErrorString on this thread.
Result complain(Result result, const std::string& text);
void count(const std::string& what, uint64_t n = 1);

#define LOCK_AND_CHECK_CONTEXT                                                                              \
    std::lock_guard lock(cuda_on_host::mutex);                                                              \
    if (!cuda_on_host::current_context)                                                                     \
        return cuda_on_host::complain(cuda_on_host::INVALID_CONTEXT, std::string(__func__) + ": no current context")

// ---- run_grid.cpp ----

struct Kernel {
    std::string name;
    Call call;
    const size_t* parameter_bytes;
    void* (*shared)();
};

/// Runs all blocks of a grid; the fault, or an empty string.
std::string run_grid(const Kernel& kernel, dim3 grid, dim3 block, void** params);

/// The order of blocks and threads follows from the seed and the number of grids since it was set.
void set_seed(uint64_t seed);

// ---- streams.cpp ----

/// Work for a stream, which is done when somebody waits for it; the text of its fault, or an empty string.
void enqueue(void* stream, std::function<std::string()> work);

/// Counts as a wait, and does all work of a stream, or of every stream.
Result wait_for_stream(void* stream);
Result wait_for_all();
} // namespace cuda_on_host
