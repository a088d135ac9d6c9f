// An optimizer step for all parameters in one launch, which also edits each gradient. `AdamW` and
// `Sgd` in Rust are the reference versions. The bits are the same: the operations have the same
// order, and no multiply-add is fused (-fmad=false).

#include "edit.cuh"
#include "step.cuh"

// `outcome` is null if the host decides; the rows then hold all parameters of the update.
struct Decided {
    const Outcome *outcome;
    StepCounters *counters;
    u64 *counts;
    const RowStep *row_steps;
};

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }

// `Wide::SMALLEST_EPS` in Rust.
template <typename W> struct SmallestEps { static constexpr double value = 1e-20; };
template <> struct SmallestEps<double> { static constexpr double value = 1e-150; };

template <typename W> struct AdamWStep {
    W beta1, rest1, beta2, rest2, scale_m, scale_v, decay, eps, lr;

    // Computed in double precision and then rounded: 1 - beta2 in float is off by 1.3e-5.
    __device__ inline explicit AdamWStep(const Rule &rule)
        : beta1((W)rule.beta1), rest1((W)(1.0 - rule.beta1)), beta2((W)rule.beta2), rest2((W)(1.0 - rule.beta2)),
          scale_m((W)rule.scale_m), scale_v((W)rule.scale_v), decay((W)(1.0 - rule.lr * rule.weight_decay)),
          eps((W)(rule.eps > SmallestEps<W>::value ? rule.eps : SmallestEps<W>::value)), lr((W)rule.lr) {}

    __device__ inline void operator()(W &theta, W g, W &m, W &v, bool amsgrad, W &largest) const {
        m = m * beta1 + g * rest1;
        v = v * beta2 + g * g * rest2;
        largest = amsgrad && largest > v ? largest : v; // this order keeps a NaN of v
        const W m_hat = m * scale_m, v_hat = largest * scale_v;
        theta = theta * decay - m_hat / (root(v_hat) + eps) * lr;
    }
};

template <typename W> struct SgdStep {
    W lr, weight_decay, momentum, kept;
    bool has_decay, nesterov, is_first;

    __device__ inline SgdStep(const Rule &rule, bool is_first)
        : lr((W)rule.lr), weight_decay((W)rule.weight_decay), momentum((W)rule.momentum),
          kept((W)(1.0 - rule.dampening)), has_decay(rule.weight_decay != 0.0), nesterov(rule.nesterov != 0),
          is_first(is_first) {}

    __device__ inline void operator()(W &theta, W g, bool has_buffer, W &buffer) const {
        if (has_decay) g = g + theta * weight_decay; // skipped for 0: an infinite parameter times 0 is NaN
        buffer = is_first || !has_buffer ? g : buffer * momentum + g * kept;
        const W direction = nesterov && has_buffer ? g + buffer * momentum : buffer;
        theta = theta - direction * lr;
    }
};

// The parameter in full precision: its master, or the parameter itself if the master no longer
// rounds to it because the caller has set it.
template <typename T, typename W> __device__ inline W renewed(W master, W theta) {
    const W rounded = widen(narrow<T>(master));
    return rounded == theta || (rounded != rounded && theta != theta) ? master : theta;
}

template <typename T, bool ADAMW>
__device__ inline void update_chunk(const Row &row, const Chunk &chunk, const Edit &edit, const Rule &rule, bool is_first) {
    typedef typename Wide<T>::Type W;
    const ElementEdit<W> edited(edit);
    const AdamWStep<W> adamw(rule);
    const SgdStep<W> sgd(rule, is_first);
    const T *grads = (const T *)row.grad + chunk.start;
    T *params = (T *)row.target + chunk.start;
    W *moments[3], *master = row.master ? (W *)row.master + chunk.start : nullptr;
    constexpr u32 N = Lanes<T>::value, MOMENTS = ADAMW ? 3 : 1;
    bool aligned = is_aligned<N>(grads) && is_aligned<N>(params) && is_aligned<N>(master);
#pragma unroll
    for (u32 j = 0; j < MOMENTS; j++) {
        moments[j] = row.moments[j] ? (W *)row.moments[j] + chunk.start : nullptr;
        aligned = aligned && is_aligned<N>(moments[j]);
    }
    for (u32 i = threadIdx.x * N; i < chunk.len; i += THREADS * N) {
        const u32 rest = chunk.len - i;
        const bool whole = aligned && rest >= N;
        W g[N], theta[N], full[N], m[MOMENTS][N];
        // In a parameter's first step the parameter itself is the master.
        const bool from_master = master && !is_first;
        if (whole) {
            // Load everything before the first use, so that the loads overlap.
            const Pack<T, N> packed_g = load_pack<N>(grads + i), packed_theta = load_pack<N>(params + i);
#pragma unroll
            for (u32 j = 0; j < MOMENTS; j++) {
                if (moments[j]) load(moments[j] + i, true, N, m[j]);
            }
#pragma unroll
            for (u32 k = 0; k < N; k++) {
                g[k] = widen(packed_g.x[k]);
                theta[k] = widen(packed_theta.x[k]);
            }
            if (from_master) load(master + i, true, N, full);
        } else {
            load(grads + i, false, rest, g);
            load(params + i, false, rest, theta);
            if (from_master) load(master + i, false, rest, full);
#pragma unroll
            for (u32 j = 0; j < MOMENTS; j++) {
                if (moments[j]) load(moments[j] + i, false, rest, m[j]);
            }
        }
#pragma unroll
        for (u32 k = 0; k < N; k++) {
            if (from_master) theta[k] = renewed<T>(full[k], theta[k]);
            if constexpr (ADAMW) adamw(theta[k], edited(g[k]), m[0][k], m[1][k], moments[2] != nullptr, m[2][k]);
            else sgd(theta[k], edited(g[k]), moments[0] != nullptr, m[0][k]);
        }
        if (master) store(master + i, whole, rest, theta);
        store(params + i, whole, rest, theta);
#pragma unroll
        for (u32 j = 0; j < MOMENTS; j++) {
            if (moments[j]) store(moments[j] + i, whole, rest, m[j]);
        }
    }
}

// A skipped step ends here, before the first write of a parameter. The counters change only now,
// when nothing can fail any more.
template <bool ADAMW>
__device__ inline void update(const Row *rows, u32 count, u32 chunk_len, const Rule *rules, const Decided &decided) {
    if (decided.outcome && threadIdx.x == 0 && blockIdx.x == 0) {
        decided.counters->steps = decided.outcome->steps;
        decided.counters->skips_in_a_row = decided.outcome->skips_in_a_row;
    }
    if (decided.outcome && decided.outcome->skipped) return;
    const Chunk chunk = find_chunk(rows, count, chunk_len);
    const Row &row = rows[chunk.row];
    Edit edit = edit_of(row);
    Rule rule = rules[row.rule];
    bool is_first = (row.flags & IS_FIRST) != 0;
    if (decided.outcome) {
        edit.clip_coef *= decided.outcome->clip_coef;
        edit.zero_non_finite |= decided.outcome->zero_non_finite != 0;
        const RowStep &step = decided.row_steps[chunk.row];
        rule.scale_m = step.scale_m;
        rule.scale_v = step.scale_v;
        is_first = step.is_first != 0;
        if (threadIdx.x == 0 && chunk.start == 0) decided.counts[row.state] += 1;
    }
#define UPDATE(T) update_chunk<T, ADAMW>(row, chunk, edit, rule, is_first)
    WITH_TYPE(row.dtype, UPDATE)
}

// Limits the registers to allow three blocks per multiprocessor: with two, too few loads are in
// flight.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    clip_adamw(const Row *rows, u32 count, u32 chunk_len, const Rule *rules, Decided decided) {
    update<true>(rows, count, chunk_len, rules, decided);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    clip_sgd(const Row *rows, u32 count, u32 chunk_len, const Rule *rules, Decided decided) {
    update<false>(rows, count, chunk_len, rules, decided);
}
