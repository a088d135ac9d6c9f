// The table of tensors for a launch, and how a block finds its chunk.
//
// Every kernel is launched with one block per chunk. A chunk is `chunk` elements of one tensor; the
// last chunk of a tensor may be shorter. A tensor without elements has no chunk. Nothing depends on
// the tensors' addresses, so each run gives the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256
#define WARPS (THREADS / 32)
#define FULL_WARP 0xffffffffu
#define INFINITY_F64 __longlong_as_double(0x7ff0000000000000ll)
#define NAN_F64 __longlong_as_double(0x7ff8000000000000ll)

enum DType : u32 { F32 = 0, F64 = 1, F16 = 2, BF16 = 3 };

// One tensor. `Row` in Rust has the same layout.
struct Row {
    u64 first_chunk; // the number of chunks in all rows before
    u64 elements;
    const void *grad;
    void *target;     // the output: the edited gradient, or the parameter
    void *moments[3]; // null for those that the optimizer does not use
    void *master;     // the parameter in full precision, or null
    double clip_coef;
    double clip_value; // infinite for none
    u32 dtype;
    u32 rule;  // the index of the tensor's rule
    u32 state; // the index of the tensor in the persistent state
    u32 flags;
};

#define ZERO_NON_FINITE 1u
#define IS_FIRST 2u

struct Chunk {
    u32 row;
    u64 start; // the index of its first element
    u32 len;
};

// Finds this block's chunk: the last row whose first chunk is not after it. Each step of the search
// leaves a thirty-second of the rows. All threads of the block get the same result.
__device__ inline Chunk find_chunk(const Row *rows, u32 count, u32 chunk) {
    const u64 block = blockIdx.x;
    const u32 lane = threadIdx.x % 32;
    u32 low = 0, len = count;
    while (len > 1) {
        const u32 step = (len + 31) / 32;
        const u32 probe = low + lane * step;
        const bool before = lane * step < len && rows[probe].first_chunk <= block;
        const u32 last = 31 - __clz(__ballot_sync(FULL_WARP, before)); // always true for lane 0
        low += last * step;
        len = min(step, len - last * step);
    }
    // Rows without elements have the same first chunk as the next row. The search returns the last
    // of them.
    Chunk found;
    found.row = low;
    found.start = (block - rows[low].first_chunk) * chunk;
    const u64 rest = rows[low].elements - found.start;
    found.len = rest < chunk ? (u32)rest : chunk;
    return found;
}

// The compute dtype of an element type.
template <typename T> struct Wide { typedef float Type; };
template <> struct Wide<double> { typedef double Type; };

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T narrow(typename Wide<T>::Type x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline double narrow<double>(double x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Elements per thread and iteration. With two doubles AdamW would exceed its registers.
template <typename T> struct Lanes { static const u32 value = 4; };
template <> struct Lanes<double> { static const u32 value = 1; };

// `N` elements, loaded and stored at once if they are aligned to their size.
template <typename T, u32 N> struct alignas(N * sizeof(T)) Pack { T x[N]; };

template <u32 N, typename T> __device__ inline bool is_aligned(const T *values) {
    return (u64)values % sizeof(Pack<T, N>) == 0;
}

template <u32 N, typename T> __device__ inline Pack<T, N> load_pack(const T *values) {
    return *reinterpret_cast<const Pack<T, N> *>(values);
}

template <u32 N, typename T, typename W> __device__ inline void load(const T *values, bool whole, u32 len, W (&out)[N]) {
    if (whole) {
        const Pack<T, N> pack = load_pack<N>(values);
#pragma unroll
        for (u32 k = 0; k < N; k++) out[k] = widen(pack.x[k]);
    } else {
#pragma unroll
        for (u32 k = 0; k < N; k++) out[k] = k < len ? (W)widen(values[k]) : (W)0;
    }
}

template <u32 N, typename T, typename W> __device__ inline void store(T *values, bool whole, u32 len, const W (&in)[N]) {
    if (whole) {
        Pack<T, N> pack;
#pragma unroll
        for (u32 k = 0; k < N; k++) pack.x[k] = narrow<T>(in[k]);
        *reinterpret_cast<Pack<T, N> *>(values) = pack;
    } else {
#pragma unroll
        for (u32 k = 0; k < N; k++) {
            if (k < len) values[k] = narrow<T>(in[k]);
        }
    }
}

// Calls `CALL(T)` for the type of a row's elements.
#define WITH_TYPE(DTYPE, CALL)                                                                                         \
    switch (DTYPE) {                                                                                                   \
    case F32: CALL(float); break;                                                                                      \
    case F64: CALL(double); break;                                                                                     \
    case F16: CALL(__half); break;                                                                                     \
    default: CALL(__nv_bfloat16); break;                                                                               \
    }
