// Power sums that can't overflow or underflow. `ScaledPowerSum`, `Stats` and `Norm` in Rust have
// the same layout.
#pragma once

#include "table.cuh"

enum NormKind : u32 { L1 = 0, L2 = 1, INF = 2, P = 3 };

struct Norm {
    u32 kind;
    double p;
};

// The sum of (|x| / scale)^p over the finite elements, and the number of non-finite elements.
struct Stats {
    double scale, sum;
    u64 nan, infinite;
};

// The stats of a gradient before and after clamping.
struct GradStats {
    Stats stats, clamped;
    u64 num_clipped;
};

__device__ inline Stats no_stats() { return {1.0, 0.0, 0, 0}; }
__device__ inline GradStats no_grad_stats() { return {no_stats(), no_stats(), 0}; }

// The last bit depends on the order: fold in a fixed order.
__device__ inline Stats merge(const Stats a, const Stats b, const Norm norm) {
    Stats all = {a.scale, a.sum, a.nan + b.nan, a.infinite + b.infinite};
    if (b.sum == 0.0) return all;
    if (a.sum == 0.0) {
        all.scale = b.scale;
        all.sum = b.sum;
        return all;
    }
    const bool first = a.scale >= b.scale;
    const double scale = first ? a.scale : b.scale, sum = first ? a.sum : b.sum;
    const double small_scale = first ? b.scale : a.scale, small_sum = first ? b.sum : a.sum;
    all.scale = scale;
    if (norm.kind == INF) {
        all.sum = sum;
    } else if (scale == small_scale) {
        all.sum = sum + small_sum;
    } else {
        const double ratio = small_scale / scale;
        const double factor = norm.kind == L1 ? ratio : norm.kind == L2 ? ratio * ratio : pow(ratio, norm.p);
        all.sum = sum + small_sum * factor;
    }
    return all;
}

__device__ inline GradStats merge(const GradStats &a, const GradStats &b, const Norm norm) {
    return {merge(a.stats, b.stats, norm), merge(a.clamped, b.clamped, norm), a.num_clipped + b.num_clipped};
}

// min(1, max_norm / (norm + eps)), also correct if the norm overflows a double.
__device__ inline double clip_coef(const Stats stats, const Norm norm, double max_norm, double eps) {
    if (max_norm == INFINITY_F64) return 1.0;
    if (max_norm == 0.0) return 0.0;
    double scale = 1.0, root = 0.0;
    if (stats.sum != 0.0) {
        scale = stats.scale;
        root = norm.kind == L1   ? stats.sum
               : norm.kind == L2 ? sqrt(stats.sum)
               : norm.kind == INF ? 1.0
                                  : pow(stats.sum, 1.0 / norm.p);
    }
    const double value = scale * root;
    const double ratio = isfinite(value) ? max_norm / (value + eps) : max_norm / scale / root;
    return fmin(ratio, 1.0);
}

// Reduces the values of all threads of the block by `op`, in a fixed order. Every thread gets the
// result.
template <typename X, typename Op> __device__ inline X reduce_block(X x, Op op) {
    __shared__ X of_warps[WARPS];
    for (u32 offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_down_sync(FULL_WARP, x, offset));
    __syncthreads(); // the results of a previous call may still be read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[0];
    for (u32 warp = 1; warp < WARPS; warp++) x = op(x, of_warps[warp]);
    return x;
}

template <typename X> __device__ inline X sum_block(X x) {
    return reduce_block(x, [](X a, X b) { return a + b; });
}

// Merges the stats of all threads in a tree order. Only thread 0 gets the result.
__device__ inline GradStats merge_block(const GradStats &own, const Norm norm) {
    __shared__ GradStats parts[THREADS];
    __syncthreads();
    parts[threadIdx.x] = own;
    __syncthreads();
    for (u32 width = THREADS / 2; width > 0; width /= 2) {
        if (threadIdx.x < width) parts[threadIdx.x] = merge(parts[threadIdx.x], parts[threadIdx.x + width], norm);
        __syncthreads();
    }
    return parts[0];
}
