// __half and __nv_bfloat16: conversions to the bit, arithmetic in f32 and rounded, which is what
// one rounding gives for + - * / and sqrt, as f32 has more than twice their digits. Not so for fma:
// that goes through f64, where the product is exact.
#pragma once
#include "../shim.h"

namespace cuda_on_host {
/// A 16-bit float of E exponent and M mantissa bits.
template <int E, int M> struct Small {
    uint16_t __x;

    Small() = default;
    template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>> Small(T x) : __x(round(double(x))) {}
    operator float() const { return widen(__x); }
    static Small from_bits(uint16_t bits) { Small s; s.__x = bits; return s; }

    static constexpr int BIAS = (1 << (E - 1)) - 1;
    static constexpr uint16_t INF = ((1 << E) - 1) << M;

    /// To nearest, ties to even; NaN becomes CUDA's canonical one.
    static uint16_t round(double x) {
        if (std::isnan(x)) return 0x7fff;
        uint16_t sign = std::signbit(x) ? 0x8000 : 0;
        x = std::fabs(x);
        if (x == 0) return sign;
        int exponent = std::isinf(x) ? BIAS + 1 : std::ilogb(x);
        if (exponent > BIAS) return sign | INF;
        bool subnormal = exponent < 1 - BIAS;
        if (subnormal) exponent = 1 - BIAS;
        // The mantissa as an integer, with its leading 1; a carry out of it raises the exponent, and may reach INF.
        int mantissa = int(std::nearbyint(std::ldexp(x, M - exponent)));
        int bits = subnormal ? mantissa : ((exponent + BIAS) << M) + mantissa - (1 << M);
        return sign | uint16_t(bits);
    }
    static float widen(uint16_t bits) {
        uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << (23 - M);
        if ((bits & 0x7fff) >= INF) return __uint_as_float(sign | 0x7f800000 | (rest & 0x7fffff));
        // Read with f32's bias, then corrected by a power of two: exact for subnormals too.
        float shift = E == 8 ? 1.0f : 0x1p112f;
        return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * shift));
    }
};
} // namespace cuda_on_host

using __half = cuda_on_host::Small<5, 10>;
using __nv_bfloat16 = cuda_on_host::Small<8, 7>;
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
struct __align__(4) __half2 { __half x, y; };
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __double2half(double x) { return x; }
inline unsigned short __half_as_ushort(__half x) { return x.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half::from_bits(bits); }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat16 __double2bfloat16(double x) { return x; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::from_bits(bits); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }

#define CUDA_ON_HOST_SMALL_ARITHMETIC(S, S2)                                                                \
    inline S operator+(S a, S b) { return float(a) + float(b); }                                            \
    inline S operator-(S a, S b) { return float(a) - float(b); }                                            \
    inline S operator*(S a, S b) { return float(a) * float(b); }                                            \
    inline S operator/(S a, S b) { return float(a) / float(b); }                                            \
    inline S operator-(S a) { return S::from_bits(a.__x ^ 0x8000); }                                        \
    inline S& operator+=(S& a, S b) { return a = a + b; }                                                   \
    inline S& operator-=(S& a, S b) { return a = a - b; }                                                   \
    inline S& operator*=(S& a, S b) { return a = a * b; }                                                   \
    inline S& operator/=(S& a, S b) { return a = a / b; }                                                   \
    inline bool operator==(S a, S b) { return float(a) == float(b); }                                       \
    inline bool operator!=(S a, S b) { return float(a) != float(b); }                                       \
    inline bool operator<(S a, S b) { return float(a) < float(b); }                                         \
    inline bool operator<=(S a, S b) { return float(a) <= float(b); }                                       \
    inline bool operator>(S a, S b) { return float(a) > float(b); }                                         \
    inline bool operator>=(S a, S b) { return float(a) >= float(b); }                                       \
    inline S __hadd(S a, S b) { return a + b; }                                                             \
    inline S __hsub(S a, S b) { return a - b; }                                                             \
    inline S __hmul(S a, S b) { return a * b; }                                                             \
    inline S __hdiv(S a, S b) { return a / b; }                                                             \
    inline S __hfma(S a, S b, S c) { return double(float(a)) * double(float(b)) + double(float(c)); }       \
    inline S __hneg(S a) { return -a; }                                                                     \
    inline S __habs(S a) { return S::from_bits(a.__x & 0x7fff); }                                           \
    inline bool __hisnan(S a) { return (a.__x & 0x7fff) > S::INF; }                                         \
    inline int __hisinf(S a) { return a.__x == S::INF ? 1 : a.__x == (S::INF | 0x8000) ? -1 : 0; }          \
    inline S __hmax(S a, S b) { return fmaxf(a, b); }                                                       \
    inline S __hmin(S a, S b) { return fminf(a, b); }                                                       \
    inline S __hmax_nan(S a, S b) { return __hisnan(a) || __hisnan(b) ? S(NAN) : __hmax(a, b); }            \
    inline S __hmin_nan(S a, S b) { return __hisnan(a) || __hisnan(b) ? S(NAN) : __hmin(a, b); }            \
    inline S hsqrt(S a) { return sqrtf(a); }                                                                \
    inline S hexp(S a) { return expf(a); }                                                                  \
    inline S hlog(S a) { return logf(a); }                                                                  \
    inline S hcos(S a) { return cosf(a); }                                                                  \
    inline S hsin(S a) { return sinf(a); }                                                                  \
    inline S2 __hadd2(S2 a, S2 b) { return {a.x + b.x, a.y + b.y}; }                                        \
    inline S2 __hsub2(S2 a, S2 b) { return {a.x - b.x, a.y - b.y}; }                                        \
    inline S2 __hmul2(S2 a, S2 b) { return {a.x * b.x, a.y * b.y}; }                                        \
    inline S2 __h2div(S2 a, S2 b) { return {a.x / b.x, a.y / b.y}; }
CUDA_ON_HOST_SMALL_ARITHMETIC(__half, __half2)
CUDA_ON_HOST_SMALL_ARITHMETIC(__nv_bfloat16, __nv_bfloat162)
