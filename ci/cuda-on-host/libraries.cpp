// The calls of cuBLAS and cuRAND that candle makes: matrix products as plain loops, and random
// numbers of the C++ library.

#include <memory>
#include <random>

#include "include/cuda_bf16.h"
#include "runtime.h"

using namespace cuda_on_host;

namespace {
using Status = int;

// cudaDataType and cublasComputeType_t
enum Type { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };
enum Compute { COMPUTE_16F = 64, COMPUTE_16F_PEDANTIC = 65, COMPUTE_64F = 70 };

double get(const void* from, long long at, int type) {
    switch (type) {
    case F32: return static_cast<const float*>(from)[at];
    case F64: return static_cast<const double*>(from)[at];
    case F16: return static_cast<const __half*>(from)[at];
    case BF16: return static_cast<const __nv_bfloat16*>(from)[at];
    default: abort();
    }
}
void set(void* to, long long at, int type, double x) {
    switch (type) {
    case F32: static_cast<float*>(to)[at] = float(x); break;
    case F64: static_cast<double*>(to)[at] = x; break;
    case F16: static_cast<__half*>(to)[at] = x; break;
    case BF16: static_cast<__nv_bfloat16*>(to)[at] = x; break;
    default: abort();
    }
}
} // namespace

struct Handle {
    void* stream = nullptr;
};

API Status cublasCreate_v2(Handle** out) { *out = new Handle; return 0; }
API Status cublasDestroy_v2(Handle* handle) { delete handle; return 0; }
API Status cublasSetStream_v2(Handle* handle, void* stream) { handle->stream = stream; return 0; }

// C = alpha * op(A) * op(B) + beta * C, column after column; op transposes where it is not 0.
API Status cublasGemmStridedBatchedEx(Handle* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                                      int type_a, int lda, long long stride_a, const void* b, int type_b, int ldb,
                                      long long stride_b, const void* beta, void* c, int type_c, int ldc, long long stride_c,
                                      int batches, int compute, int) {
    int type = compute == COMPUTE_64F ? F64 : compute == COMPUTE_16F || compute == COMPUTE_16F_PEDANTIC ? F16 : F32;
    double by = get(alpha, 0, type), old = get(beta, 0, type);
    std::lock_guard lock(mutex);
    enqueue(handle->stream, [=] {
        for (int batch = 0; batch < batches; batch++)
            for (long long col = 0; col < n; col++)
                for (long long row = 0; row < m; row++) {
                    double sum = 0;
                    for (long long i = 0; i < k; i++)
                        sum += get(a, batch * stride_a + (op_a ? row * lda + i : i * lda + row), type_a) *
                               get(b, batch * stride_b + (op_b ? i * ldb + col : col * ldb + i), type_b);
                    long long at = batch * stride_c + col * ldc + row;
                    set(c, at, type_c, by * sum + (old == 0 ? 0 : old * get(c, at, type_c)));
                }
        return "";
    });
    return 0;
}
API Status cublasDgemmStridedBatched(Handle* handle, int op_a, int op_b, int m, int n, int k, const double* alpha,
                                     const double* a, int lda, long long stride_a, const double* b, int ldb,
                                     long long stride_b, const double* beta, double* c, int ldc, long long stride_c,
                                     int batches) {
    return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, F64, lda, stride_a, b, F64, ldb, stride_b, beta, c,
                                      F64, ldc, stride_c, batches, COMPUTE_64F, 0);
}

struct Generator {
    std::shared_ptr<std::mt19937_64> numbers = std::make_shared<std::mt19937_64>();
    void* stream = nullptr;
};

template <typename T, typename D> Status generate(Generator* generator, T* out, size_t n, D distribution) {
    std::lock_guard lock(mutex);
    enqueue(generator->stream, [=, numbers = generator->numbers]() mutable {
        for (size_t i = 0; i < n; i++) out[i] = distribution(*numbers);
        return "";
    });
    return 0;
}
API Status curandCreateGenerator(Generator** out, int) { *out = new Generator; return 0; }
API Status curandDestroyGenerator(Generator* generator) { delete generator; return 0; }
API Status curandSetStream(Generator* generator, void* stream) { generator->stream = stream; return 0; }
API Status curandSetPseudoRandomGeneratorSeed(Generator* generator, unsigned long long seed) {
    generator->numbers = std::make_shared<std::mt19937_64>(seed);
    return 0;
}
API Status curandGenerateUniform(Generator* g, float* out, size_t n) { return generate(g, out, n, std::uniform_real_distribution<float>()); }
API Status curandGenerateUniformDouble(Generator* g, double* out, size_t n) {
    return generate(g, out, n, std::uniform_real_distribution<double>());
}
API Status curandGenerateNormal(Generator* g, float* out, size_t n, float mean, float std) {
    return generate(g, out, n, std::normal_distribution<float>(mean, std));
}
API Status curandGenerateNormalDouble(Generator* g, double* out, size_t n, double mean, double std) {
    return generate(g, out, n, std::normal_distribution<double>(mean, std));
}
