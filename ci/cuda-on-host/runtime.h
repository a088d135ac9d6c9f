// What the parts of the stand-in driver share.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "shim.h"

namespace cuda_on_host {
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
} // namespace cuda_on_host
