// Scales, clamps or cleans all gradients in one launch, in place or into copies.

#include "edit.cuh"

template <typename T> __device__ inline void edit_chunk(const Row &row, const Chunk &chunk) {
    const ElementEdit<typename Wide<T>::Type> edit(edit_of(row));
    const T *source = (const T *)row.grad + chunk.start;
    T *target = (T *)row.target + chunk.start;
    constexpr u32 N = Lanes<T>::value;
    const bool aligned = is_aligned<N>(source) && is_aligned<N>(target);
    for (u32 i = threadIdx.x * N; i < chunk.len; i += THREADS * N) {
        const u32 rest = chunk.len - i;
        const bool whole = aligned && rest >= N;
        typename Wide<T>::Type x[N];
        load(source + i, whole, rest, x);
#pragma unroll
        for (u32 k = 0; k < N; k++) x[k] = edit(x[k]);
        store(target + i, whole, rest, x);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) clip_edit(const Row *rows, u32 count, u32 chunk_len) {
    const Chunk chunk = find_chunk(rows, count, chunk_len);
    const Row &row = rows[chunk.row];
#define EDIT(T) edit_chunk<T>(row, chunk)
    WITH_TYPE(row.dtype, EDIT)
}
