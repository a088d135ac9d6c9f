//! The structs that host and GPU exchange: the same fields as in the kernels crate's `cuda/*.cuh`.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_grad_clip_kernels::{self as kernels, NormType, ScaledPowerSum};

use crate::gradients::{GradStats, Plan, Request};
use crate::param_state::StepRule;

/// A pointer to GPU memory.
pub(super) type Address = u64;

pub(super) const ZERO_NON_FINITE: u32 = 1;
pub(super) const IS_FIRST: u32 = 2;

/// `Row` of `table.cuh`: one tensor.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Row {
    pub(super) first_chunk: u64,
    pub(super) elements: u64,
    pub(super) grad: Address,
    pub(super) target: Address,
    pub(super) moments: [Address; kernels::MAX_MOMENTS],
    pub(super) master: Address,
    pub(super) clip_coef: f64,
    pub(super) clip_value: f64,
    pub(super) dtype: u32,
    pub(super) rule: u32,
    pub(super) state: u32,
    pub(super) flags: u32,
}

/// `Norm` of `stats.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Norm {
    kind: u32,
    p: f64,
}

impl From<NormType> for Norm {
    fn from(norm_type: NormType) -> Self {
        let kind = match norm_type {
            NormType::L1 => 0,
            NormType::L2 => 1,
            NormType::Inf => 2,
            NormType::P(_) => 3,
        };
        Self {
            kind,
            p: norm_type.p(),
        }
    }
}

/// `Stats` of `stats.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Stats {
    scale: f64,
    sum: f64,
    nan: u64,
    infinite: u64,
}

impl From<Stats> for kernels::Stats {
    fn from(stats: Stats) -> Self {
        let Stats {
            scale,
            sum,
            nan,
            infinite,
        } = stats;
        Self {
            power: ScaledPowerSum { scale, sum },
            nan,
            infinite,
        }
    }
}

/// `GradStats` of `stats.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DeviceStats {
    stats: Stats,
    clamped: Stats,
    num_clipped: u64,
}

impl From<DeviceStats> for GradStats {
    fn from(measured: DeviceStats) -> Self {
        Self {
            stats: measured.stats.into(),
            clamped: measured.clamped.into(),
            num_clipped: measured.num_clipped,
        }
    }
}

/// `Request` of `measure.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DeviceRequest {
    norm: Norm,
    clip_value: f64,
    zero_non_finite: u32,
    chunk: u32,
}

impl DeviceRequest {
    pub(super) fn new(request: Request, chunk: u32) -> Self {
        Self {
            norm: request.norm_type.into(),
            clip_value: request.clip_value.unwrap_or(f64::INFINITY),
            zero_non_finite: request.zero_non_finite.into(),
            chunk,
        }
    }
}

/// `Results` of `measure.cu` and `Parts` of `fold.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Parts {
    pub(super) stats: Address,
    pub(super) clamped: Address,
    pub(super) num_clipped: Address,
}

/// `Policy` of `fold.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Policy {
    norm: Norm,
    max_norm: f64,
    eps: f64,
    has_clamped: u32,
    skip_non_finite: u32,
    zero_non_finite: u32,
    chunk: u32,
}

impl Policy {
    pub(super) fn new(plan: &Plan, chunk: u32) -> Self {
        Self {
            norm: plan.request.norm_type.into(),
            max_norm: plan.max_norm,
            eps: plan.eps,
            has_clamped: plan.request.clip_value.is_some().into(),
            skip_non_finite: plan.skip_non_finite.into(),
            zero_non_finite: plan.request.zero_non_finite.into(),
            chunk,
        }
    }
}

/// `State` of `fold.cu`; all pointers are null if the host decides.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct FoldState {
    pub(super) outcome: Address,
    pub(super) counters: Address,
    pub(super) counts: Address,
    pub(super) row_steps: Address,
    pub(super) rules: Address,
}

/// `Decided` of `update.cu`; all pointers are null if the host decides.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Decided {
    pub(super) outcome: Address,
    pub(super) counters: Address,
    pub(super) counts: Address,
    pub(super) row_steps: Address,
}

/// `RowStep` of `step.cuh`; only the kernels use its fields.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
#[allow(dead_code)] // the host only uses its size
pub(super) struct RowStep {
    scale_m: f64,
    scale_v: f64,
    is_first: u32,
}

/// `StepCounters` of `step.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct StepCounters {
    pub(super) steps: u64,
    pub(super) skips_in_a_row: u32,
    pub(super) blocks_done: u32,
}

/// `Outcome` of `step.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DeviceOutcome {
    pub(super) total: DeviceStats,
    pub(super) clip_coef: f64,
    pub(super) steps: u64,
    pub(super) skipped: u32,
    pub(super) skips_in_a_row: u32,
    pub(super) first_bad: u32,
    pub(super) zero_non_finite: u32,
}

/// `Rule` of `step.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RuleNumbers {
    lr: f64,
    weight_decay: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    scale_m: f64,
    scale_v: f64,
    momentum: f64,
    dampening: f64,
    nesterov: u32,
}

impl From<StepRule> for RuleNumbers {
    fn from(rule: StepRule) -> Self {
        match rule {
            StepRule::AdamW(rule) => Self {
                lr: rule.lr,
                weight_decay: rule.weight_decay,
                beta1: rule.beta1,
                beta2: rule.beta2,
                eps: rule.eps,
                scale_m: rule.scale(rule.beta1),
                scale_v: rule.scale(rule.beta2),
                ..Self::default()
            },
            StepRule::Sgd(rule) => Self {
                lr: rule.lr,
                weight_decay: rule.weight_decay,
                momentum: rule.momentum,
                dampening: rule.dampening,
                nesterov: rule.nesterov.into(),
                ..Self::default()
            },
        }
    }
}

macro_rules! device_repr {
    ($($name:ident: $size:literal),*) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: `repr(C)`, with the fields of the kernels' struct in the same order, all
            // numbers.
            unsafe impl DeviceRepr for $name {}
        )*
    };
}

device_repr!(
    Row: 96, Stats: 32, DeviceStats: 72, DeviceRequest: 32, Parts: 24, Policy: 48, FoldState: 40, Decided: 32,
    RowStep: 24, StepCounters: 16, DeviceOutcome: 104, RuleNumbers: 80
);
