// Folds the stats of chunks to one per tensor. The block that ends last folds these to the total
// and decides: the coefficient of a norm clip, and whether to skip the step. The host reads
// nothing.

#include "step.cuh"

struct Policy {
    Norm norm;
    double max_norm, eps;
    u32 has_clamped;
    u32 skip_non_finite;
    u32 zero_non_finite;
    u32 chunk;
};

struct Parts {
    const Stats *stats, *clamped;
    const u64 *num_clipped;
};

// `outcome` is null if the host decides.
struct State {
    Outcome *outcome;
    StepCounters *counters;
    const u64 *counts;  // the number of updates of a tensor, by `Row::state`
    RowStep *row_steps; // the parameters of this update, by row
    const Rule *rules;
};

// base^exponent as `f64::powi` computes it.
__device__ inline double powi(double base, u32 exponent) {
    double power = 1.0;
    for (;;) {
        if (exponent & 1) power *= base;
        exponent /= 2;
        if (exponent == 0) return power;
        base *= base;
    }
}

__device__ inline RowStep row_step(const Row &row, const State &state) {
    const u64 taken = state.counts[row.state];
    const u32 exponent = taken < 0x7fffffffull ? (u32)taken + 1 : 0x7fffffffu;
    const Rule &rule = state.rules[row.rule];
    return {1.0 / (1.0 - powi(rule.beta1, exponent)), 1.0 / (1.0 - powi(rule.beta2, exponent)), taken == 0};
}

__device__ inline GradStats fold_chunks(const Row &row, const Policy &policy, const Parts &parts) {
    const u64 chunks = (row.elements + policy.chunk - 1) / policy.chunk;
    GradStats own = no_grad_stats();
    for (u64 i = threadIdx.x; i < chunks; i += THREADS) {
        const u64 at = row.first_chunk + i;
        own.stats = merge(own.stats, parts.stats[at], policy.norm);
        if (policy.has_clamped) {
            own.clamped = merge(own.clamped, parts.clamped[at], policy.norm);
            own.num_clipped += parts.num_clipped[at];
        }
    }
    return merge_block(own, policy.norm);
}

// Whether this block is the last of the launch to get here. It sees all writes of the others.
__device__ inline bool is_last_block(StepCounters *counters) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&counters->blocks_done, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return is_last;
}

__device__ inline void decide(const GradStats &total, u32 first_bad, const Policy &policy, const State &state) {
    const Stats stats = total.stats;
    const bool bad = stats.nan + stats.infinite > 0;
    const bool skip = bad && policy.skip_non_finite;
    const bool zero = bad && policy.zero_non_finite;
    double coef = 0.0;
    if (policy.max_norm == INFINITY_F64 || zero || !bad) coef = clip_coef(stats, policy.norm, policy.max_norm, policy.eps);
    else if (stats.nan > 0) coef = NAN_F64;
    StepCounters *counters = state.counters;
    counters->blocks_done = 0;
    const u32 skips = skip ? counters->skips_in_a_row + 1 : 0;
    *state.outcome = {total, coef, counters->steps + !skip, skip, skips, first_bad, zero};
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    clip_fold(const Row *rows, u32 count, Policy policy, Parts parts, GradStats *tensors, State state) {
    const GradStats tensor = fold_chunks(rows[blockIdx.x], policy, parts);
    if (threadIdx.x == 0) {
        tensors[blockIdx.x] = tensor;
        if (state.outcome) state.row_steps[blockIdx.x] = row_step(rows[blockIdx.x], state);
    }
    if (!state.outcome || !is_last_block(state.counters)) return;

    GradStats own = no_grad_stats();
    u32 first_bad = count;
    for (u32 row = threadIdx.x; row < count; row += THREADS) {
        // Bypasses the L1 cache, which does not see other blocks' writes.
        GradStats tensor;
        const u64 *from = (const u64 *)(tensors + row);
        u64 *to = (u64 *)&tensor;
        for (u32 word = 0; word < sizeof(GradStats) / sizeof(u64); word++) to[word] = __ldcg(from + word);
        if (first_bad == count && tensor.stats.nan + tensor.stats.infinite > 0) first_bad = row;
        own = merge(own, tensor, policy.norm);
    }
    const GradStats total = merge_block(own, policy.norm);
    first_bad = reduce_block(first_bad, [](u32 a, u32 b) { return min(a, b); });
    if (threadIdx.x == 0) decide(total, first_bad, policy, state);
}
