use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::{Edit, Norm, NormType};

use crate::as_vars::AsVars;
use crate::backend;
use crate::check::{check_bound, check_norm_type, check_not_negative};
use crate::clip::{CLIP_EPS, Edits, NonFinite, clip_coef};
use crate::error::{Error, Result};
use crate::gradients::Request;
use crate::pipeline::collect::check_any_match;
use crate::pipeline::edit::{Scratch, edit_copies, edit_in_place, insert};
use crate::pipeline::measure::{measure, non_finite_error, walk};

/// Returns the norm of the gradients of `vars`, seen as one vector: `(sum |g|^p)^(1/p)`.
///
/// `vars` is any list of Vars: see [`AsVars`]. The gradients can have any shape, can mix f32, f64,
/// f16 and bf16, and can be on any devices. The function reads each gradient once and changes
/// nothing. Vars without a gradient are ignored, and a Var that is listed twice counts once. The
/// [`GradStore`] may also hold gradients of other tensors, such as constants; they are ignored.
///
/// On CPU the relative error is at most 1e-12 for L1, L2, infinity and `p >= 0.5`, in every dtype.
/// The norm of f32 gradients of `1e25` or `1e-25`, or of f64 gradients of `1e200`, is correct;
/// PyTorch, TensorFlow and optax return infinity or 0 there. The result does not depend on the
/// number of threads.
///
/// Returns NaN if any element is NaN, else infinity if any element is infinite. The result is also
/// infinite if the norm of finite elements exceeds the maximum of f64. The clipping functions still
/// use the correct coefficient then (0 if it underflows f64).
///
/// # Errors
/// An invalid `norm_type`. A gradient whose shape, dtype or device differs from its Var's. A dtype
/// other than the four. A store that has gradients, but none for `vars`.
///
/// # References
/// `torch.nn.utils.get_total_norm` (PyTorch 2.15), `tf.linalg.global_norm` (TensorFlow 2.21).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{NormType, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?; // the gradient is w itself
/// assert_eq!(total_norm(&grads, &[w.clone()], NormType::L2)?, 5.0);
/// assert_eq!(total_norm(&grads, &[w], NormType::Inf)?, 4.0);
/// # Ok(())
/// # }
/// ```
pub fn total_norm(
    grads: &GradStore,
    vars: &(impl AsVars + ?Sized),
    norm_type: NormType,
) -> Result<f64> {
    let request = Request::norm(check_norm_type(norm_type)?);
    let vars = vars.vars();
    let vars = vars.list();
    check_any_match(vars.vars, grads)?;
    Ok(measure(vars, grads, request)?.total_norm())
}

/// Options of [`clip_grad_norm_with`].
///
/// ```
/// use candle_grad_clip::{ClipGradNorm, NonFinite, NormType};
/// let options = ClipGradNorm { max_norm: 0.5, norm_type: NormType::Inf, ..Default::default() };
/// assert_eq!((options.eps, options.non_finite), (1e-6, NonFinite::Error));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClipGradNorm {
    /// The limit, 0 or above. 0 sets all gradients to 0; infinity only measures. Default: 1.
    pub max_norm: f64,
    /// The norm that is limited. Default: L2.
    pub norm_type: NormType,
    /// Added to the norm before the division. Default: 1e-6.
    pub eps: f64,
    /// What to do when gradients are NaN or infinite. Default: [`NonFinite::Error`].
    pub non_finite: NonFinite,
}

impl Default for ClipGradNorm {
    fn default() -> Self {
        Self {
            max_norm: 1.0,
            norm_type: NormType::L2,
            eps: CLIP_EPS,
            non_finite: NonFinite::Error,
        }
    }
}

/// Scales the gradients of `vars` in place so that their global L2 norm is at most `max_norm` (up
/// to the dtype's rounding): `g * min(1, max_norm / (total_norm + 1e-6))`. Returns the norm before
/// clipping.
///
/// The gradients can have any shape, can mix f32, f64, f16 and bf16, and can be on any devices. If
/// the coefficient is exactly 1, nothing is written. `max_norm` 0 gives zero gradients. An infinite
/// `max_norm` only measures (PyTorch can write NaN then).
///
/// # In place
/// On CPU and CUDA the caller's clones of a gradient change too, because they share its storage. A
/// gradient gets new storage in these cases:
///
/// - It is itself a Var, or shares storage with one of `vars`.
/// - It shares storage with an entry of the store that does not belong to `vars`.
/// - It is not contiguous.
/// - It shares storage with an earlier gradient of `vars`. The first contiguous one keeps the
///   storage, so other tensors of the caller in that storage change.
///
/// This way no gradient is scaled twice and no weight changes. On other devices, every gradient
/// that changes gets new storage. Do not clip one gradient from two threads at the same time: it
/// may be scaled twice.
///
/// # Errors
/// A `max_norm` that is negative or NaN. Non-finite elements (the error names the first Var that
/// has some). A store that has gradients, but none for `vars` (an empty store or an empty `vars` is
/// no error). A gradient whose shape, dtype or device differs from its Var's. A dtype other than
/// the four. On error nothing is changed.
///
/// # References
/// `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), whose default for `error_if_nonfinite` is
/// false.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::clip_grad_norm;
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?; // the gradient is (3, 4)
/// assert_eq!(clip_grad_norm(&mut grads, &[w.clone()], 1.0)?, 5.0);
/// let clipped = grads.get(&w).unwrap().to_vec1::<f64>()?; // (0.6, 0.8): the direction is kept
/// assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_norm(
    grads: &mut GradStore,
    vars: &(impl AsVars + ?Sized),
    max_norm: f64,
) -> Result<f64> {
    clip_grad_norm_with(
        grads,
        vars,
        &ClipGradNorm {
            max_norm,
            ..ClipGradNorm::default()
        },
    )
}

/// As [`clip_grad_norm`], with a choice of norm, `eps` and policy for non-finite elements.
///
/// Under [`NonFinite::Zero`] the function returns the norm of the finite elements. Under
/// [`NonFinite::SkipStep`] it leaves gradients with non-finite elements unchanged.
///
/// # Errors
/// As [`clip_grad_norm`]. An invalid `norm_type` or `eps`. Non-finite elements are an error only
/// under [`NonFinite::Error`].
///
/// # References
/// `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{ClipGradNorm, NormType, clip_grad_norm_with};
///
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// let options = ClipGradNorm { max_norm: 2.0, norm_type: NormType::Inf, ..Default::default() };
/// assert_eq!(clip_grad_norm_with(&mut grads, &[w], &options)?, 4.0);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
pub fn clip_grad_norm_with(
    grads: &mut GradStore,
    vars: &(impl AsVars + ?Sized),
    options: &ClipGradNorm,
) -> Result<f64> {
    check_bound("max_norm", options.max_norm)?;
    check_not_negative("eps", options.eps)?;
    let request = Request::norm(check_norm_type(options.norm_type)?);
    let vars = vars.vars();
    let vars = vars.list();
    check_any_match(vars.vars, grads)?;
    let measured = measure(vars, grads, request)?;
    let bad = measured.total.stats.non_finite() > 0;
    match options.non_finite {
        NonFinite::Error if bad => return Err(non_finite_error(vars, &measured)),
        NonFinite::SkipStep if bad => return Ok(measured.total_norm()),
        _ => {}
    }
    let zero_non_finite = bad && options.non_finite == NonFinite::Zero;
    let clip_coef = clip_coef(
        measured.total.stats,
        measured.norm_type,
        options.max_norm,
        options.eps,
        zero_non_finite,
    );
    let norm = if zero_non_finite {
        measured.norm().value()
    } else {
        measured.total_norm()
    };
    let replacements = edit_in_place(
        vars,
        grads,
        &measured.entries,
        &Edits::All(Edit::Scale {
            clip_coef,
            zero_non_finite,
        }),
    )?;
    insert(grads, replacements);
    Ok(norm)
}

/// Scales the gradients of `vars` in place for a known `total_norm`:
/// `g * min(1, max_norm / (total_norm + 1e-6))`.
///
/// Use it when the norm covers more than `vars`: several stores, or several processes. "In place"
/// has the same meaning as for [`clip_grad_norm`]. NaN elements stay NaN.
///
/// # Errors
/// A `max_norm` that is negative or NaN. A `total_norm` that is negative or non-finite. A gradient
/// whose shape, dtype or device differs from its Var's. A dtype other than the four. A store that
/// has gradients, but none for `vars`. On error nothing is changed.
///
/// # References
/// `torch.nn.utils.clip_grads_with_norm_` (PyTorch 2.15), which accepts any `total_norm`.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{NormType, clip_grads_with_norm, total_norm};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let vars = [Var::new(&[3f64, 4.0], &Device::Cpu)?];
/// let mut grads = (vars[0].sqr()?.sum_all()? / 2.0)?.backward()?;
/// let norm = total_norm(&grads, &vars, NormType::L2)?;
/// clip_grads_with_norm(&mut grads, &vars, 1.0, norm)?;
/// assert!(total_norm(&grads, &vars, NormType::L2)? <= 1.0);
/// # Ok(())
/// # }
/// ```
pub fn clip_grads_with_norm(
    grads: &mut GradStore,
    vars: &(impl AsVars + ?Sized),
    max_norm: f64,
    total_norm: f64,
) -> Result<()> {
    check_bound("max_norm", max_norm)?;
    if !(total_norm >= 0.0 && total_norm.is_finite()) {
        return Err(Error::InvalidOption {
            name: "total_norm",
            value: total_norm,
            expected: "0 or a finite value above: gradients with that norm can't be scaled by it",
        });
    }
    let vars = vars.vars();
    let vars = vars.list();
    check_any_match(vars.vars, grads)?;
    let clip_coef = Norm::known(total_norm).clip_coef(max_norm, CLIP_EPS);
    let entries = walk(vars, grads, None)?;
    let replacements = edit_in_place(
        vars,
        grads,
        &entries,
        &Edits::All(Edit::Scale {
            clip_coef,
            zero_non_finite: false,
        }),
    )?;
    insert(grads, replacements);
    Ok(())
}

/// Clamps every element of the gradients of `vars` to `[-clip_value, clip_value]`, in place.
///
/// Infinite elements become the bound and NaN stays NaN, on every device. Unlike norm clipping,
/// this changes the gradient's direction: (3, 4) with a `clip_value` of 1 becomes (1, 1). The bound
/// is rounded to the gradient's dtype: in f16, 1e5 becomes infinity and changes nothing, and 1e-9
/// becomes 0. "In place" has the same meaning as for [`clip_grad_norm`]. On CPU and CUDA this takes
/// one pass over the gradients, without a measurement.
///
/// # Errors
/// A `clip_value` that is negative or NaN. A gradient whose shape, dtype or device differs from its
/// Var's. A dtype other than the four. A store that has gradients, but none for `vars`. On error
/// nothing is changed.
///
/// # References
/// `torch.nn.utils.clip_grad_value_` (PyTorch 2.15).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::clip_grad_value;
///
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// clip_grad_value(&mut grads, &[w.clone()], 1.0)?;
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [1.0, 1.0]);
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
pub fn clip_grad_value(
    grads: &mut GradStore,
    vars: &(impl AsVars + ?Sized),
    clip_value: f64,
) -> Result<()> {
    check_bound("clip_value", clip_value)?;
    let vars = vars.vars();
    let vars = vars.list();
    check_any_match(vars.vars, grads)?;
    let mut entries = walk(vars, grads, None)?;
    if clip_value == f64::INFINITY {
        return Ok(());
    }
    // candle's clamp can't handle non-finite elements, so count them first.
    backend::candle_ops::measure(&mut entries, Request::norm(NormType::L1))?;
    let edits = Edits::All(Edit::Clamp {
        clip_value,
        clip_coef: 1.0,
        zero_non_finite: false,
    });
    let replacements = edit_in_place(vars, grads, &entries, &edits)?;
    insert(grads, replacements);
    Ok(())
}

/// TensorFlow's clip by global norm: returns a new store with the clipped gradients, and the norm.
/// The formula is `g * clip_norm / max(total_norm, clip_norm)`, without an eps. `grads` is
/// unchanged.
///
/// `use_norm` is the norm to clip by, if it is already known. The new store also holds the
/// gradients of other tensors, unchanged. Unchanged gradients share their storage with `grads`.
///
/// As in TensorFlow, a non-finite norm sets every gradient of `vars` to NaN, unless `clip_norm` is
/// infinite, which changes nothing. A `clip_norm` of 0 gives zeros (TensorFlow gives NaN if the
/// norm is 0 too).
///
/// # Errors
/// A `clip_norm` or `use_norm` that is negative or NaN. A gradient whose shape, dtype or device
/// differs from its Var's. A dtype other than the four. A store that has gradients, but none for
/// `vars`.
///
/// # References
/// `tf.clip_by_global_norm` (TensorFlow 2.21).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::clip_by_global_norm;
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// let (clipped, norm) = clip_by_global_norm(&grads, &[w.clone()], 2.5, None)?;
/// assert_eq!(norm, 5.0);
/// assert_eq!(clipped.get(&w).unwrap().to_vec1::<f32>()?, [1.5, 2.0]);
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [3.0, 4.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_by_global_norm(
    grads: &GradStore,
    vars: &(impl AsVars + ?Sized),
    clip_norm: f64,
    use_norm: Option<f64>,
) -> Result<(GradStore, f64)> {
    check_bound("clip_norm", clip_norm)?;
    let vars = vars.vars();
    let vars = vars.list();
    check_any_match(vars.vars, grads)?;
    let (entries, norm, total_norm, finite) = if let Some(known) = use_norm {
        check_bound("use_norm", known)?;
        (
            walk(vars, grads, None)?,
            Norm::known(known),
            known,
            known.is_finite(),
        )
    } else {
        let request = Request::norm(NormType::L2);
        let measured = measure(vars, grads, request)?;
        let finite = measured.total.stats.non_finite() == 0;
        let (norm, total_norm) = (measured.norm(), measured.total_norm());
        (measured.entries, norm, total_norm, finite)
    };
    let clip_coef = if finite || clip_norm == f64::INFINITY {
        norm.clip_coef(clip_norm, 0.0)
    } else {
        f64::NAN
    };
    let edits = Edits::All(Edit::Scale {
        clip_coef,
        zero_non_finite: false,
    });
    Ok((
        edit_copies(vars, grads, &entries, &edits, &mut Scratch::default())?,
        total_norm,
    ))
}
