// A step that the device decides: its persistent counters and its outcome.
#pragma once

#include "stats.cuh"

// The counters that are kept from step to step. `StepCounters` in Rust has the same layout.
struct StepCounters {
    u64 steps; // taken
    u32 skips_in_a_row;
    u32 blocks_done; // of the launch under way
};

// The step of one tensor, by its own count: AdamW's bias corrections, and whether it is the first.
// `RowStep` in Rust has the same layout.
struct RowStep {
    double scale_m, scale_v;
    u32 is_first;
};

// The outcome of a step, which its update also uses. `DeviceOutcome` in Rust has the same layout.
struct Outcome {
    GradStats total;
    double clip_coef;
    u64 steps; // taken, this one included
    u32 skipped;
    u32 skips_in_a_row;
    u32 first_bad; // the first row with a non-finite element
    u32 zero_non_finite;
};

// An optimizer's parameters. `RuleNumbers` in Rust has the same layout. AdamW uses lr,
// weight_decay, beta1, beta2, eps and the bias corrections; SGD uses lr, weight_decay, momentum,
// dampening and nesterov.
struct Rule {
    double lr, weight_decay;
    double beta1, beta2, eps;
    double scale_m, scale_v;
    double momentum, dampening;
    u32 nesterov;
};
