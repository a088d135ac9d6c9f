// Reads every gradient once, in one launch. `measure_chunk` in Rust is the reference version.
//
// A block sums its chunk in double precision. There the square of a float is exact and a sum of
// squares can't overflow, so a non-finite sum means a non-finite element. Only then, or if a sum of
// doubles leaves the safe range, the chunk is read again, with a scale.

#include "stats.cuh"

struct Request {
    Norm norm;
    double clip_value; // infinite for none
    u32 zero_non_finite;
    u32 chunk;
};

template <typename T> struct ExactSquares { static const bool value = true; };
template <> struct ExactSquares<double> { static const bool value = false; };

template <typename T> __device__ inline bool is_safe(double sum) {
    return ExactSquares<T>::value ? isfinite(sum) : sum >= 1e-270 && sum < 1e300;
}

// Calls `op` on |x| of each of this thread's elements. For any address these are the same elements
// in the same order. Aligned values are loaded in packs of 16 bytes, `LOADS` packs before the first
// use, so that loads overlap.
template <u32 LOADS, typename T, typename Op> __device__ inline void for_each(const T *values, u32 len, Op op) {
    constexpr u32 N = 16 / sizeof(T), STEP = THREADS * N;
    u32 i = threadIdx.x * N;
    if (is_aligned<N>(values)) {
        for (; i - threadIdx.x * N + LOADS * STEP <= len; i += LOADS * STEP) {
            Pack<T, N> packs[LOADS];
#pragma unroll
            for (u32 load = 0; load < LOADS; load++) packs[load] = load_pack<N>(values + i + load * STEP);
#pragma unroll
            for (u32 load = 0; load < LOADS; load++) {
#pragma unroll
                for (u32 k = 0; k < N; k++) op(fabs((double)widen(packs[load].x[k])));
            }
        }
        for (; i < len && len - i >= N; i += STEP) {
            const Pack<T, N> pack = load_pack<N>(values + i);
#pragma unroll
            for (u32 k = 0; k < N; k++) op(fabs((double)widen(pack.x[k])));
        }
    }
    for (; i < len; i += STEP) {
        for (u32 k = 0; k < N && k < len - i; k++) op(fabs((double)widen(values[i + k])));
    }
}

template <u32 KIND> __device__ inline double add(double sum, double x) {
    return KIND == L1 ? sum + x : fma(x, x, sum);
}

// The smaller of both. NaN stays NaN.
__device__ inline double at_most(double x, double bound) { return x > bound ? bound : x; }

// The largest power of two at or below x > 0.
__device__ inline double power_of_two(double x) {
    const long long exponent = __double_as_longlong(x) & 0x7ff0000000000000ll;
    return exponent == 0 ? 2.2250738585072014e-308 : __longlong_as_double(exponent);
}

// Not inlined: one copy of this long function is enough.
__device__ __noinline__ double power(double x, double p) { return pow(x, p); }

// Any norm, for elements of any size, in two reads; the first finds the largest element. With
// `only_finite`, non-finite elements are ignored.
template <u32 KIND, typename T>
__device__ inline Stats measure_scaled(const T *values, u32 len, double p, double bound, bool only_finite) {
    u64 nan = 0, infinite = 0;
    double largest = 0.0;
    for_each<1>(values, len, [&](double x) {
        if (only_finite && !isfinite(x)) return;
        x = at_most(x, bound);
        if (isfinite(x)) largest = fmax(largest, x);
        else if (isnan(x)) nan++;
        else infinite++;
    });
    Stats stats = no_stats();
    stats.nan = sum_block(nan);
    stats.infinite = sum_block(infinite);
    largest = reduce_block(largest, [](double a, double b) { return fmax(a, b); });
    if (largest == 0.0) return stats;
    stats.scale = KIND == L1 || KIND == L2 ? power_of_two(largest) : largest;
    stats.sum = 1.0;
    if (KIND == INF) return stats;
    double sum = 0.0;
    for_each<1>(values, len, [&](double x) {
        if (only_finite && !isfinite(x)) return;
        x = at_most(x, bound);
        if (!isfinite(x)) return;
        const double ratio = x / stats.scale;
        sum += KIND == L1 ? ratio : KIND == L2 ? ratio * ratio : power(ratio, p);
    });
    stats.sum = sum_block(sum);
    return stats;
}

// The same out of line for the rare case, so that its registers don't burden the common path.
template <u32 KIND, typename T>
__device__ __noinline__ void measure_again(const T *values, u32 len, double bound, bool only_finite, Stats &stats) {
    stats = measure_scaled<KIND>(values, len, 0.0, bound, only_finite);
}

template <typename T> __device__ __noinline__ u64 count_above(const T *values, u32 len, double bound, bool only_finite) {
    u64 above = 0;
    for_each<1>(values, len, [&](double x) { above += x > bound && !(only_finite && isinf(x)); });
    return sum_block(above);
}

struct Results {
    Stats *stats, *clamped;
    u64 *num_clipped;
};

// A norm that is a plain sum: KIND is L1 or L2.
template <typename T, u32 KIND, bool CLAMP>
__device__ inline void measure_sum(const T *values, u32 len, const Request &request, const Results &out) {
    const double bound = CLAMP ? (double)widen(narrow<T>((typename Wide<T>::Type)request.clip_value)) : 0.0;
    double sum = 0.0, clamped = 0.0;
    u64 above = 0;
    for_each<4>(values, len, [&](double x) {
        sum = add<KIND>(sum, x);
        if (CLAMP) {
            clamped = add<KIND>(clamped, at_most(x, bound));
            above += x > bound;
        }
    });
    sum = sum_block(sum);
    bool safe = is_safe<T>(sum);
    Stats stats = {1.0, sum, 0, 0}, after = no_stats();
    if (CLAMP) {
        after.sum = sum_block(clamped);
        above = sum_block(above);
        safe = safe && is_safe<T>(after.sum);
    }
    if (!safe) {
        measure_again<KIND>(values, len, INFINITY_F64, false, stats);
        if (CLAMP) {
            measure_again<KIND>(values, len, bound, request.zero_non_finite, after);
            above = count_above(values, len, bound, request.zero_non_finite);
        }
    }
    if (threadIdx.x == 0) {
        out.stats[blockIdx.x] = stats;
        if (CLAMP) {
            out.clamped[blockIdx.x] = after;
            out.num_clipped[blockIdx.x] = above;
        }
    }
}

// KIND is INF or P.
template <typename T, u32 KIND>
__device__ inline void measure_other(const T *values, u32 len, const Request &request, const Results &out) {
    const Stats stats = measure_scaled<KIND>(values, len, request.norm.p, INFINITY_F64, false);
    if (threadIdx.x == 0) out.stats[blockIdx.x] = stats;
    if (!out.clamped) return;
    const double bound = widen(narrow<T>((typename Wide<T>::Type)request.clip_value));
    const Stats after = measure_scaled<KIND>(values, len, request.norm.p, bound, request.zero_non_finite);
    const u64 above = count_above(values, len, bound, request.zero_non_finite);
    if (threadIdx.x == 0) {
        out.clamped[blockIdx.x] = after;
        out.num_clipped[blockIdx.x] = above;
    }
}

#define MEASURE(NAME, CALL)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        NAME(const Row *rows, u32 count, Request request, Results out) {                                               \
        const Chunk chunk = find_chunk(rows, count, request.chunk);                                                    \
        const void *grad = rows[chunk.row].grad;                                                                       \
        WITH_TYPE(rows[chunk.row].dtype, CALL)                                                                         \
    }

#define VALUES(T) (const T *)grad + chunk.start, chunk.len, request, out
#define SUM_L1(T) measure_sum<T, L1, false>(VALUES(T))
#define SUM_L2(T) measure_sum<T, L2, false>(VALUES(T))
#define SUM_L1_CLAMPED(T) measure_sum<T, L1, true>(VALUES(T))
#define SUM_L2_CLAMPED(T) measure_sum<T, L2, true>(VALUES(T))
#define LARGEST(T) measure_other<T, INF>(VALUES(T))
#define POWER(T) measure_other<T, P>(VALUES(T))

MEASURE(clip_measure_l1, SUM_L1)
MEASURE(clip_measure_l2, SUM_L2)
MEASURE(clip_measure_l1_clamped, SUM_L1_CLAMPED)
MEASURE(clip_measure_l2_clamped, SUM_L2_CLAMPED)
MEASURE(clip_measure_inf, LARGEST)
MEASURE(clip_measure_p, POWER)
