// Kernels that tests/cuda_on_host/driver.rs launches to see that faults are found, and that what is no
// fault works.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

static __device__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

// Sums of whole blocks; the last block to come adds those up, in their order.
extern "C" __global__ void __launch_bounds__(256)
selftest_sum(const float* __restrict__ in, unsigned n, float* block_sums, unsigned* arrived, float* out) {
    __shared__ float warps[8];
    __shared__ bool is_last;
    float sum = 0;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) {
            block_sums[blockIdx.x] = sum;
            __threadfence();
            is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
        }
    }
    __syncthreads();
    if (!is_last || threadIdx.x != 0) return;
    sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += block_sums[i];
    *out = sum;
}

extern "C" __global__ void selftest_reverse(float* data) {
    extern __shared__ float reversed[];
    reversed[blockDim.x - 1 - threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = reversed[threadIdx.x];
}

extern "C" __global__ void selftest_ballot(unsigned* out) {
    out[threadIdx.x] = __ballot_sync(0xffffffff, threadIdx.x % 3 == 0);
}

extern "C" __global__ void selftest_round(const double* in, unsigned n, __half* f16, __nv_bfloat16* bf16, __half* f32_f16,
                                          __nv_bfloat16* f32_bf16, float* widened_f16, float* widened_bf16) {
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        f16[i] = __double2half(in[i]);
        bf16[i] = __double2bfloat16(in[i]);
        f32_f16[i] = __float2half_rn(float(in[i]));
        f32_bf16[i] = __float2bfloat16_rn(float(in[i]));
        widened_f16[i] = __half2float(__ushort_as_half(i));
        widened_bf16[i] = __bfloat162float(__ushort_as_bfloat16(i));
    }
}

// ---- Faults ----

extern "C" __global__ void selftest_missing_barrier(float* out) {
    __shared__ float values[64];
    values[threadIdx.x] = 1;
    out[threadIdx.x] = values[63 - threadIdx.x];
}

extern "C" __global__ void selftest_two_barriers(float* out) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}

extern "C" __global__ void selftest_lonely_shuffle(float* out) {
    if (threadIdx.x == 0) out[0] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
    __syncthreads();
}

// Legal, but lanes that have exited have no value.
extern "C" __global__ void selftest_shuffle_with_exited(float* out) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 16);
}

extern "C" __global__ void selftest_out_of_bounds(float* out) { out[blockDim.x + threadIdx.x] = 1; }
