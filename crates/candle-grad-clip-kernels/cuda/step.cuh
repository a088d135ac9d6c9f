// A step that is decided on the device: what lasts from step to step, and what a step tells.
#pragma once

#include "stats.cuh"

// What lasts. `Clock` in Rust has the same layout.
struct Clock {
    u64 steps; // taken
    u32 skips_in_a_row;
    u32 blocks_done; // of the launch under way
};

// The step of one tensor, which counts its own: what corrects AdamW's bias, and whether it is the first. `RowStep` in Rust has
// the same layout.
struct RowStep {
    double scale_m, scale_v;
    u32 is_first;
};

// What a step tells, and what its update goes by. `Outcome` in Rust has the same layout.
struct Outcome {
    GradStats total;
    double clip_coef;
    u64 steps; // taken, this one included
    u32 skipped;
    u32 skips_in_a_row;
    u32 first_bad; // the first row with an element that is not finite
    u32 zero_non_finite;
};

// An optimizer's numbers; `RuleNumbers` in Rust has the same layout. AdamW: lr, weight_decay, beta1, beta2, eps, and what
// corrects the bias. SGD: lr, weight_decay, momentum, dampening.
struct Rule {
    double lr, weight_decay;
    double beta1, beta2, eps;
    double scale_m, scale_v;
    double momentum, dampening;
    u32 nesterov;
};
