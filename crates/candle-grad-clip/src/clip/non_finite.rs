/// What to do when a gradient has NaN or infinite elements. It means the same on every device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum NonFinite {
    /// An error that names the first bad Var and how many values are bad; nothing is changed.
    /// As `error_if_nonfinite=True` of `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
    Error,
    /// The step is not taken: weights and optimizer state stay as they are, a warning says why.
    /// More than [`Clip::max_skips`](crate::Clip::max_skips) in a row are an error. In a free
    /// function, which has no step to skip, the gradients are left alone.
    SkipStep,
    /// Elements that are not finite become 0, then the rest is clipped by its own norm.
    Zero,
    /// What PyTorch does: a NaN makes every gradient NaN; an infinity makes the finite ones 0 and
    /// itself NaN under a norm clip, and the bound under a value clip.
    Propagate,
}
