// CUDA's device language as C++ for the host: `g++ -std=c++20 -x c++ -include shim.h -I include k.cu`.
//
// A `.cu` file compiles unchanged. The threads of a block are fibers that `run_block.cpp` switches
// at barriers and warp operations; blocks run one after the other. See README.md for what that
// can't show.
#pragma once

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

// `build.sh` lists the kernels of a file in the preprocessor's output, by this word.
#ifdef CUDA_ON_HOST_LIST_KERNELS
#define __global__ CUDA_ON_HOST_KERNEL
#else
#define __global__ __attribute__((noinline, used))
#endif
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
// At block scope this means `static thread_local`. All shared variables of a library are its
// thread-local segment, which is how `run_block.cpp` finds them to poison them before each block.
#define __shared__ thread_local

// ---- Vectors ----

#define CUDA_ON_HOST_VECTORS(T, name, align2, align4)                                                       \
    struct name##1 { T x; };                                                                                \
    struct __align__(align2) name##2 { T x, y; };                                                           \
    struct name##3 { T x, y, z; };                                                                          \
    struct __align__(align4) name##4 { T x, y, z, w; };                                                     \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                              \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                      \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_HOST_VECTORS(signed char, char, 2, 4)
CUDA_ON_HOST_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_HOST_VECTORS(short, short, 4, 8)
CUDA_ON_HOST_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_HOST_VECTORS(int, int, 8, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_HOST_VECTORS(long long, longlong, 16, 16)
CUDA_ON_HOST_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_HOST_VECTORS(float, float, 8, 16)
CUDA_ON_HOST_VECTORS(double, double, 16, 16)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- Threads ----

#pragma GCC visibility push(default)
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_host {
/// What a lane without a value in an exchange seems to hold: NaN in every float type.
constexpr uint64_t POISON = ~uint64_t(0);

/// Waits for all threads of the block that have not exited. A barrier is one line of one file.
void block_barrier(const char* file, int line);

/// Waits for the lanes in `mask` that have not exited, and returns what lane `source` brought; POISON
/// where none is.
uint64_t exchange(unsigned mask, uint64_t value, int source, const char* file, int line);

/// Waits like `exchange`, and returns the lanes that voted yes.
unsigned ballot(unsigned mask, bool vote, const char* file, int line);

/// Reports a fault of the kernel, with kernel, block and thread, and aborts.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

using Call = void (*)(void** params);
/// Makes a kernel known by name. `parameter_bytes` ends with a 0; `shared` is a thread-local variable
/// of the kernel's library.
void register_kernel(const char* name, Call call, const size_t* parameter_bytes, void* (*shared)());
} // namespace cuda_on_host
#pragma GCC visibility pop

namespace cuda_on_host {
template <typename To, typename From> To bits_as(From from) {
    static_assert(std::is_trivially_copyable_v<From>);
    To to{};
    memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    return to;
}

inline unsigned lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

/// The value of the lane at place `source(own place)` among `width` lanes; one's own where that is
/// outside of them.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, const char* file, int line, Source source) {
    static_assert(sizeof(T) <= 8);
    int place = int(lane()) % width, from = source(place);
    if (from < 0 || from >= width) from = place;
    return bits_as<T>(exchange(mask, bits_as<uint64_t>(value), int(lane()) - place + from, file, line));
}

/// Calls a kernel with the parameters that cuLaunchKernel got: pointers to its arguments.
template <auto kernel, typename... A, size_t... I>
void call_kernel(void (*)(A...), void** params, std::index_sequence<I...>) {
    (void)params;
    kernel(*static_cast<std::decay_t<A>*>(params[I])...);
}
template <auto kernel> void call(void** params) {
    [&]<typename... A>(void (*)(A...)) {
        call_kernel<kernel>(kernel, params, std::index_sequence_for<A...>{});
    }(kernel);
}
template <typename... A> const size_t* parameter_bytes(void (*)(A...)) {
    static const size_t bytes[] = {sizeof(A)..., 0};
    return bytes;
}
static inline void* shared() {
    static thread_local char variable;
    return &variable;
}
} // namespace cuda_on_host

/// `build.sh` appends one for each kernel of a file.
#define CUDA_ON_HOST_REGISTER(kernel)                                                                       \
    static const bool registered_##kernel = (cuda_on_host::register_kernel(                                 \
        #kernel, cuda_on_host::call<&kernel>, cuda_on_host::parameter_bytes(&kernel), cuda_on_host::shared), true);

constexpr int warpSize = 32;

// The default arguments are those of the place of the call.
#define CUDA_ON_HOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(CUDA_ON_HOST_HERE) { cuda_on_host::block_barrier(file, line); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_HOST_HERE) { cuda_on_host::ballot(mask, true, file, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <typename T> T __shfl_sync(unsigned mask, T v, int source, int width = 32, CUDA_ON_HOST_HERE) {
    return cuda_on_host::shuffle(mask, v, width, file, line, [=](int) { return source & (width - 1); });
}
template <typename T> T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, CUDA_ON_HOST_HERE) {
    return cuda_on_host::shuffle(mask, v, width, file, line, [=](int lane) { return lane ^ bits; });
}
template <typename T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, CUDA_ON_HOST_HERE) {
    return cuda_on_host::shuffle(mask, v, width, file, line, [=](int lane) { return lane + int(by); });
}
template <typename T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, CUDA_ON_HOST_HERE) {
    return cuda_on_host::shuffle(mask, v, width, file, line, [=](int lane) { return lane - int(by); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
    return cuda_on_host::ballot(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}

// ---- Atomics: fibers switch at barriers only, so a plain read and write can't be torn. ----

namespace cuda_on_host {
template <typename T, typename F> T update(T* address, F f) {
    T old = *address;
    *address = f(old);
    return old;
}
template <typename T> using Same = std::common_type_t<T>; // not deduced
} // namespace cuda_on_host

template <typename T> T atomicAdd(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return T(old + v); }); }
template <typename T> T atomicSub(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return T(old - v); }); }
template <typename T> T atomicMin(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return v < old ? v : old; }); }
template <typename T> T atomicMax(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return old < v ? v : old; }); }
template <typename T> T atomicAnd(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return T(old & v); }); }
template <typename T> T atomicOr(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return T(old | v); }); }
template <typename T> T atomicXor(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T old) { return T(old ^ v); }); }
template <typename T> T atomicExch(T* a, cuda_on_host::Same<T> v) { return cuda_on_host::update(a, [=](T) { return v; }); }
template <typename T> T atomicCAS(T* a, cuda_on_host::Same<T> expected, cuda_on_host::Same<T> v) {
    return cuda_on_host::update(a, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned* a, unsigned last) {
    return cuda_on_host::update(a, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* a, unsigned last) {
    return cuda_on_host::update(a, [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}

// ---- Loads, bits, integers ----

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, cuda_on_host::Same<T> v) { *p = v; }
template <typename T> void __stcg(T* p, cuda_on_host::Same<T> v) { *p = v; }

inline unsigned __float_as_uint(float x) { return cuda_on_host::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_host::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::bits_as<float>(x); }
inline float __int_as_float(int x) { return cuda_on_host::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_host::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_host::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }

// As in CUDA, any two numbers; of floats, the one that is no NaN.
template <typename A, typename B, typename T = std::common_type_t<A, B>> std::enable_if_t<std::is_arithmetic_v<T>, T> min(A a, B b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B, typename T = std::common_type_t<A, B>> std::enable_if_t<std::is_arithmetic_v<T>, T> max(A a, B b) {
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}

// ---- Arithmetic that the compiler may not contract; `-ffp-contract=off` leaves nothing to do. ----

#define CUDA_ON_HOST_ROUNDED(T, prefix, root, fused)                                                        \
    inline T __##prefix##add_rn(T a, T b) { return a + b; }                                                 \
    inline T __##prefix##sub_rn(T a, T b) { return a - b; }                                                 \
    inline T __##prefix##mul_rn(T a, T b) { return a * b; }                                                 \
    inline T __##prefix##div_rn(T a, T b) { return a / b; }                                                 \
    inline T __##prefix##rcp_rn(T a) { return T(1) / a; }                                                   \
    inline T __##prefix##sqrt_rn(T a) { return root(a); }                                                   \
    inline T __##fused##_rn(T a, T b, T c) { return std::fma(a, b, c); }
CUDA_ON_HOST_ROUNDED(float, f, sqrtf, fmaf)
CUDA_ON_HOST_ROUNDED(double, d, sqrt, fma)

// Conversions round to nearest even, and to the nearest integer of the type where out of range (NaN: 0).
namespace cuda_on_host {
template <typename I, typename F> I saturated(F x) {
    if (x != x) return 0;
    if (x <= F(std::numeric_limits<I>::min())) return std::numeric_limits<I>::min();
    if (x >= F(std::numeric_limits<I>::max())) return std::numeric_limits<I>::max();
    return I(x);
}
} // namespace cuda_on_host
inline float __double2float_rn(double x) { return float(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline double __ll2double_rn(long long x) { return double(x); }
inline double __ull2double_rn(unsigned long long x) { return double(x); }
inline int __float2int_rn(float x) { return cuda_on_host::saturated<int>(rintf(x)); }
inline int __float2int_rz(float x) { return cuda_on_host::saturated<int>(truncf(x)); }
inline long long __double2ll_rn(double x) { return cuda_on_host::saturated<long long>(rint(x)); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float normcdff(float x) { return 0.5f * erfcf(-x * float(M_SQRT1_2)); }
inline double normcdf(double x) { return 0.5 * erfc(-x * M_SQRT1_2); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline double exp10(double x) { return pow(10.0, x); }

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")

// Last: the headers above must not take this for nvcc.
#define __CUDACC__ 1
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
