// The edit of one element, as `Edit` in Rust.
#pragma once

#include "table.cuh"

struct Edit {
    double clip_coef, clip_value;
    bool zero_non_finite;
};

__device__ inline Edit edit_of(const Row &row) {
    return {row.clip_coef, row.clip_value, (row.flags & ZERO_NON_FINITE) != 0};
}

template <typename W> struct ElementEdit;

template <> struct ElementEdit<double> {
    double clip_coef, clip_value;
    bool zero_non_finite;

    __device__ inline explicit ElementEdit(const Edit &edit)
        : clip_coef(edit.clip_coef), clip_value(edit.clip_value), zero_non_finite(edit.zero_non_finite) {}

    __device__ inline double operator()(double x) const {
        if (zero_non_finite && !isfinite(x)) return 0.0;
        x = x > clip_value ? clip_value : x < -clip_value ? -clip_value : x;
        return x * clip_coef;
    }
};

template <> struct ElementEdit<float> {
    // The coefficient as two factors; the second is 1 unless it is below float's normal range.
    float factors[2];
    float clip_value;
    bool zero_non_finite;

    __device__ inline explicit ElementEdit(const Edit &edit)
        : clip_value((float)edit.clip_value), zero_non_finite(edit.zero_non_finite) {
        const double coef = edit.clip_coef;
        factors[0] = (float)coef;
        factors[1] = 1.0f;
        if (coef != 0.0 && fabs(coef) < 1.1754943508222875e-38) {
            const float root = (float)sqrt(fabs(coef));
            factors[0] = root;
            factors[1] = coef < 0.0 ? -root : root;
        }
    }

    __device__ inline float operator()(float x) const {
        if (zero_non_finite && !isfinite(x)) return 0.0f;
        x = x > clip_value ? clip_value : x < -clip_value ? -clip_value : x;
        return x * factors[0] * factors[1];
    }
};
