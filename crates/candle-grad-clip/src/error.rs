use std::io;
use std::path::PathBuf;

use candle_core::DType;
use candle_grad_clip_kernels::NormType;

use crate::skip_reason::{SkipReason, too_many_skips};

/// `Result` with this crate's [`Error`].
///
/// ```
/// # use candle_core::{Device, Var};
/// use candle_grad_clip::{NormType, Result, total_norm};
///
/// fn norm_of_squares(w: &Var) -> Result<f64> {
///     let grads = w.sqr()?.sum_all()?.backward()?; // candle's errors become this crate's
///     total_norm(&grads, &[w.clone()], NormType::L2)
/// }
/// assert_eq!(norm_of_squares(&Var::new(&[3f32, 4.0], &Device::Cpu)?)?, 10.0);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
pub type Result<T> = std::result::Result<T, Error>;

/// The errors of this crate. After any of them, weights, optimizer state and gradients are
/// unchanged, except if an inner optimizer's own `step` fails half way.
///
/// It converts into [`candle_core::Error`], so `?` works in functions that return candle's
/// `Result`, `anyhow`'s or this crate's. The conversion keeps only the text. For the typed error
/// use [`ClippedOptimizer::step_report`](crate::ClippedOptimizer::step_report).
///
/// ```
/// use candle_core::backprop::GradStore;
/// use candle_grad_clip::{Error, clip_grad_norm};
/// use candle_nn::VarMap;
///
/// let error = clip_grad_norm(&mut GradStore::default(), &VarMap::new(), -1.0).unwrap_err();
/// assert!(matches!(error, Error::InvalidOption { name: "max_norm", .. }));
/// assert_eq!(error.to_string(), "max_norm is -1, expected 0 or above");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A limit or option outside its range.
    ///
    /// ```
    /// use candle_core::Var;
    /// use candle_grad_clip::{Clip, ClippedOptimizer, Error};
    /// # use candle_nn::{Optimizer, SGD};
    /// # let sgd = SGD::new(vec![], 0.1)?;
    ///
    /// let error = ClippedOptimizer::wrap(sgd, Vec::<Var>::new(), Clip::norm(0.0)).unwrap_err();
    /// assert!(matches!(error, Error::InvalidOption { name: "max_norm", value: 0.0, .. }));
    /// assert!(error.to_string().contains("Clip::none() turns clipping off"));
    /// # Ok::<(), Error>(())
    /// ```
    #[error("{name} is {value}, expected {expected}")]
    InvalidOption {
        /// The field or argument.
        name: &'static str,
        /// The given value.
        value: f64,
        /// The allowed range, and what to do.
        expected: &'static str,
    },
    /// An invalid norm order.
    #[error("norm_type is {p}, expected 1, 2, inf or any p > 0")]
    InvalidNormType {
        /// The given exponent.
        p: f64,
    },
    /// NaN or infinite gradients, under [`NonFinite::Error`](crate::NonFinite::Error).
    #[error(
        "the gradients are not finite, so their {norm_type}-norm is not either: the first bad Var \
         is {var} with {nan} NaN and {infinite} infinite of {elements} values ({total} bad values \
         in all); nothing was changed; look at the data and the learning rate, or take another \
         NonFinite policy"
    )]
    NonFinite {
        /// Name of the first Var whose gradient is bad.
        var: String,
        /// NaN values in its gradient.
        nan: u64,
        /// Infinite values in its gradient.
        infinite: u64,
        /// Values in its gradient.
        elements: usize,
        /// NaN and infinite values in all gradients.
        total: u64,
        /// The type of the norm.
        norm_type: NormType,
    },
    /// More steps in a row were skipped than [`Clip::max_skips`](crate::Clip::max_skips) allows.
    /// The other fields describe the last of them.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_nn::{Optimizer, SGD};
    /// # let w = Var::new(3f32, &Device::Cpu)?;
    /// # let sgd = SGD::new(vec![w.clone()], 0.1)?;
    /// use candle_grad_clip::{Clip, ClippedOptimizer, Error, SkipReason};
    ///
    /// let clip = Clip::norm(1.0).max_skips(1);
    /// let mut opt = ClippedOptimizer::wrap(sgd, vec![w.clone()], clip)?;
    /// let loss = (w.as_tensor() * f64::NAN)?;
    /// assert!(opt.backward_step_report(&loss)?.skipped()?);
    /// let error = opt.backward_step_report(&loss).unwrap_err();
    /// let Error::TooManySkips { reason, skips, max_skips, var, .. } = error else { unreachable!() };
    /// assert_eq!((reason, skips, max_skips), (SkipReason::NonFinite, 2, 1));
    /// assert_eq!(var.as_deref(), Some("var.0"));
    /// # Ok::<(), candle_grad_clip::Error>(())
    /// ```
    #[error("{}", too_many_skips(*reason, *skips, *max_skips, var.as_deref(), *total_norm, *loss, clip))]
    TooManySkips {
        /// Why the step was skipped.
        reason: SkipReason,
        /// Skipped steps in a row, this one included.
        skips: u32,
        /// How many are allowed.
        max_skips: u32,
        /// Name of the first Var at fault, for [`SkipReason::NonFinite`] and [`SkipReason::Overflow`].
        var: Option<String>,
        /// The norm of the finite elements of all gradients.
        total_norm: f64,
        /// The loss, if the rule needs it.
        loss: Option<f64>,
        /// The [`Clip`](crate::Clip) as text.
        clip: String,
    },
    /// A loss that is not one number, for a rule that needs it.
    #[error("the loss has shape {shape:?}, expected one number: the clip looks at it (loss_z)")]
    LossShape {
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A Var with a rank for which [`AgcUnits::Optax`](crate::AgcUnits::Optax) has no units.
    #[error(
        "{var} has shape {shape:?}, and the units of optax are those of ranks 0 to 4: take AgcUnits::Rows or \
         AgcUnits::Columns, or leave it out by `exclude`"
    )]
    AgcRank {
        /// Name of the Var.
        var: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A text that is not a [`Clip`](crate::Clip), or a clip that cannot be used here.
    #[error("clip `{text}`: {reason}")]
    InvalidClip {
        /// The given value.
        text: String,
        /// What is wrong with it, and what is allowed.
        reason: String,
    },
    /// A gradient with a dtype that cannot be clipped.
    #[error("the gradient of {var} is {dtype:?}, expected F32, F64, F16 or BF16")]
    UnsupportedDType {
        /// Name of the Var.
        var: String,
        /// Its gradient's dtype.
        dtype: DType,
    },
    /// A gradient whose shape, dtype or device is not its Var's.
    #[error("{var} has {property} {expected}, but its gradient has {property} {got}")]
    Mismatch {
        /// Name of the Var.
        var: String,
        /// "shape", "dtype" or "device".
        property: &'static str,
        /// The Var's.
        expected: String,
        /// The gradient's.
        got: String,
    },
    /// A pattern of a [`ParamGroup`](crate::optim::ParamGroup), of
    /// [`NamedVars::matching`](crate::NamedVars::matching) or of [`Clip::agc`](crate::Clip::agc)
    /// that matches no Var.
    #[error(
        "pattern `{pattern}` of group `{group}` matches none of {vars} Var(s), whose names are such as \
         `{example}`; is it a typing error? (`*` stands for any characters, and the whole name must match; an \
         optimizer made of a Vec<Var> has no names)"
    )]
    UnmatchedPattern {
        /// The group's name.
        group: String,
        /// The pattern.
        pattern: String,
        /// How many Vars there are.
        vars: usize,
        /// The name of one of them.
        example: String,
    },
    /// Groups of a [`ClippedOptimizer`](crate::ClippedOptimizer) that its inner optimizer does not
    /// support.
    #[error(
        "group `{group}` sets lr_scale or weight_decay, which the inner optimizer {optimizer} has but one of; make \
         it an optim::GroupedOptimizer of them, and give the wrapper groups.max_norms_only()"
    )]
    GroupsNeedFused {
        /// The first such group's name.
        group: String,
        /// The inner optimizer's type.
        optimizer: &'static str,
    },
    /// A checkpoint that could not be written or read.
    #[error("checkpoint {}: {source}", path.display())]
    CheckpointIo {
        /// The checkpoint.
        path: PathBuf,
        /// The system's error. For a missing file its kind is `NotFound`.
        source: io::Error,
    },
    /// A file that is damaged or not a checkpoint. Or state that cannot be saved, for example
    /// because two Vars have the same name.
    #[error("checkpoint {}: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        reason: String,
    },
    /// Checkpoints of a folder, all of which are damaged.
    #[error(
        "all {} checkpoint(s) in {} are damaged: {}",
        damage.len(),
        path.display(),
        damage.join("; ")
    )]
    CheckpointsDamaged {
        /// The folder.
        path: PathBuf,
        /// What is wrong with each, by its path.
        damage: Vec<String>,
    },
    /// A checkpoint of another optimizer, or of other Vars.
    #[error(
        "checkpoint {} does not fit, nothing was changed: {}",
        path.display(),
        differences.join("; ")
    )]
    CheckpointMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// All differences, by name.
        differences: Vec<String>,
    },
    /// An error of candle, from `backward`, from the inner optimizer or from a device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// An f64 Var on Metal, whose GPUs don't compute in f64.
    #[error("{var} is F64 on Metal, which has no F64: make it F32, F16 or BF16, or put it on CPU")]
    MetalF64 {
        /// Name of the Var.
        var: String,
    },
    /// A checkpoint that was saved completely, but that a power cut may still undo.
    #[error(
        "checkpoint {}: the new file is in place and whole, but its folder could not be brought to the disk, so after a \
         power cut the old one may be there: {source}",
        path.display()
    )]
    CheckpointNotDurable {
        /// The checkpoint.
        path: PathBuf,
        /// The system's error for the folder. For an unreadable folder its kind is
        /// `PermissionDenied`.
        source: io::Error,
    },
    /// More windows of a [`GradAccumulator`](crate::GradAccumulator) in a row were empty than its
    /// [`max_skips`](crate::GradAccumulator::max_skips) allows.
    #[error(
        "{windows} window(s) in a row ended without a gradient, more than max_skips = {max_skips}: all their micro-batches \
         were dropped, as their gradients are not finite, or had weight 0 ({dropped} dropped since the accumulator was \
         made); lower the learning rate or look at the data; under a LossScaler take NonFinite::Propagate, so that \
         its scale falls"
    )]
    TooManyEmptyWindows {
        /// Empty windows in a row, this one included.
        windows: u32,
        /// How many are allowed.
        max_skips: u32,
        /// Micro-batches dropped since the accumulator was made.
        dropped: u64,
    },
    /// Gradients of a [`GradAccumulator`](crate::GradAccumulator) that hides non-finite elements,
    /// for a wrapper with a [`LossScaler`](crate::LossScaler).
    #[error(
        "the gradients come from a GradAccumulator with NonFinite::SkipStep or NonFinite::Zero, which hides overflows from the \
         LossScaler: its scale would never fall; nothing was changed; take NonFinite::Propagate (one overflow skips the step and \
         lowers the scale) or NonFinite::Error"
    )]
    HiddenOverflow,
    /// A finite gradient that overflows when it is multiplied by its coefficient: unscaled by a
    /// [`LossScaler`](crate::LossScaler) whose scale is below 1, or scaled up by a
    /// [`ClipRule`](crate::ClipRule). Under [`NonFinite::Error`](crate::NonFinite::Error).
    #[error(
        "the gradient of {var} has an element of {largest} (absolute), which times its coefficient {coef} is more than {dtype:?} \
         holds; nothing was changed; clip to a smaller norm, or take an optimizer of candle_grad_clip::optim, which computes in f32"
    )]
    Overflow {
        /// Name of the first such Var.
        var: String,
        /// Its largest absolute value, before the multiplication.
        largest: f64,
        /// Its factor: the clip's coefficient, divided by the loss scale.
        coef: f64,
        /// The dtype of the product.
        dtype: DType,
    },
    /// The inner optimizer trains Vars that the wrapper does not have. They would be neither
    /// measured nor clipped.
    #[error(
        "the inner optimizer trains {} Var(s) that the wrapper was not given: {}; expected all that it trains: wrap \
         with them too, or name them in ClippedOptimizer::wrap_allow_unclipped",
        vars.len(),
        vars.join(", ")
    )]
    UnclippedVars {
        /// Their names in the inner optimizer.
        vars: Vec<String>,
    },
    /// An optimizer that was set through [`inner_mut`](crate::ClippedOptimizer::inner_mut) does not
    /// train all of the wrapper's Vars. The others would still count in the global norm.
    #[error(
        "the optimizer that was put in does not train {} Var(s) of the wrapper: {}; expected one that trains them all: \
         wrap it anew",
        vars.len(),
        vars.join(", ")
    )]
    UntrainedVars {
        /// Their names in the wrapper.
        vars: Vec<String>,
    },
    /// Vars that both optimizers of an [`optim::Pair`](crate::optim::Pair) train.
    #[error("both optimizers of the pair train {}; expected different Vars: they would take two steps", vars.join(", "))]
    SharedVars {
        /// Their names.
        vars: Vec<String>,
    },
    /// Two Vars with the same name. Errors, groups and checkpoints could not distinguish them.
    #[error("two Vars are named `{name}`, expected a name of its own for each")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A store that has gradients, but none for any of the Vars. Most likely they are Vars of
    /// another model.
    #[error(
        "the store has {grads} gradient(s), but none for any of the {vars} Var(s): expected those of backward() on a loss \
         of these Vars; are they Vars of another model?"
    )]
    NoGradients {
        /// How many entries the store has.
        grads: usize,
        /// How many Vars were given.
        vars: usize,
    },
    /// A wrapper with a [`LossScaler`](crate::LossScaler) inside another wrapper. The losses would
    /// not be scaled.
    #[error(
        "a ClippedOptimizer with a LossScaler is the inner optimizer of another, which doesn't scale losses by it: \
         expected the LossScaler on the outermost one"
    )]
    NestedLossScaler,
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => Self::msg(other),
        }
    }
}
