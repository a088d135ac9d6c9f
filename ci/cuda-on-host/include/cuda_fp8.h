// Only enough for candle's kernels to compile: 8-bit floats are not emulated.
#pragma once
#include "cuda_fp16.h"

struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    template <typename T> explicit __nv_fp8_e4m3(T) { cuda_on_host::fault("8-bit floats are not emulated"); }
};
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(uint8_t, int) { cuda_on_host::fault("8-bit floats are not emulated"); }
