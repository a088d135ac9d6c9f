//! What is timed, who does it, and the numbers they all use.

use candle_nn::ParamsAdamW;

/// Elements outside of `[-CLIP_VALUE, CLIP_VALUE]` are one in eight.
pub(crate) const CLIP_VALUE: f64 = 0.875;
/// What a norm clip scales by.
pub(crate) const CLIP_COEF: f64 = 0.9;
/// Read before a call on a set that starts cold: four times a large cache.
pub(crate) const OTHER_BYTES: usize = 128 << 20;
/// Parameters come from indices that no gradient has, and are small, as in a model.
pub(crate) const PARAMS_START: u64 = 1 << 40;
pub(crate) const PARAMS_SCALE: f64 = 0.0625;
/// Of every step.
pub(crate) const LR: f64 = 1e-3;

pub(crate) fn params_adamw() -> ParamsAdamW {
    ParamsAdamW {
        lr: LR,
        ..ParamsAdamW::default()
    }
}

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    TotalNorm,
    ClipGradNorm,
    ClipGradNormNoop,
    ClipGradValue,
    ClipAdamW,
    ClipSgd,
    /// Measures and steps: what a step with clipping is compared with.
    #[cfg(feature = "cuda")]
    NoneSgd,
}

impl Op {
    pub(crate) const ALL: [Self; 6] = [
        Self::TotalNorm,
        Self::ClipGradNorm,
        Self::ClipGradNormNoop,
        Self::ClipGradValue,
        Self::ClipAdamW,
        Self::ClipSgd,
    ];

    /// What is timed on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) const ON_GPU: [Self; 5] = [
        Self::TotalNorm,
        Self::ClipGradNorm,
        Self::ClipAdamW,
        Self::ClipSgd,
        Self::NoneSgd,
    ];

    /// Whether it changes parameters.
    pub(crate) fn is_step(self) -> bool {
        match self {
            Self::ClipAdamW | Self::ClipSgd => true,
            #[cfg(feature = "cuda")]
            Self::NoneSgd => true,
            _ => false,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::TotalNorm => "total_norm",
            Self::ClipGradNorm => "clip_grad_norm",
            Self::ClipGradNormNoop => "clip_grad_norm_noop",
            Self::ClipGradValue => "clip_grad_value",
            Self::ClipAdamW => "clip_adamw",
            Self::ClipSgd => "clip_sgd",
            #[cfg(feature = "cuda")]
            Self::NoneSgd => "none_sgd",
        }
    }
}

/// Who does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Impl {
    CandleGradClip,
    PasteIn,
    Floor,
    /// The step of [`Op::NoneSgd`] without the norm.
    #[cfg(feature = "cuda")]
    StepAlone,
}

impl Impl {
    pub(crate) const ALL: [Self; 3] = [Self::CandleGradClip, Self::PasteIn, Self::Floor];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::CandleGradClip => "candle-grad-clip",
            Self::PasteIn => "paste-in",
            Self::Floor => "floor",
            #[cfg(feature = "cuda")]
            Self::StepAlone => "candle-grad-clip, step alone",
        }
    }
}

/// Pasted code where the allocator keeps its memory: its own process.
pub(crate) const PASTE_IN_KEPT: &str = "paste-in, memory kept";

/// A number in [-1, 1) for an index: the top 24 bits of splitmix64, exact in f32, easy to have in
/// any language.
pub(crate) fn uniform(index: u64) -> f64 {
    let mut z = (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f64 * 2f64.powi(-23) - 1.0
}
