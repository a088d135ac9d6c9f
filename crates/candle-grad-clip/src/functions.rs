use candle_core::Var;
use candle_core::backprop::GradStore;
use candle_grad_clip_kernels::{Edit, Norm, NormType};

use crate::backend;
use crate::check::{check_bound, check_norm_type, check_not_negative};
use crate::clip::{CLIP_EPS, Edits, NonFinite, clip_coef};
use crate::error::{Error, Result};
use crate::gradients::Request;
use crate::pipeline::collect::check_any_match;
use crate::pipeline::edit::{Scratch, edit_copies, edit_in_place, insert};
use crate::pipeline::measure::{measure, non_finite_error, walk};
use crate::vars::VarList;

/// The norm of the gradients of `vars`, all seen as one vector: `(sum |g|^p)^(1/p)`.
///
/// Gradients of any shape, in f32, f64, f16 or bf16, mixed, on any devices; they are read once and
/// not changed. Vars without a gradient count nothing, a Var listed twice counts once, and
/// gradients of anything but `vars` are left out (a [`GradStore`] also holds those of constants).
///
/// On CPU the relative error is at most 1e-12 for L1, L2, infinity and `p >= 0.5`, in every dtype:
/// f32 gradients of `1e25` or `1e-25` and f64 ones of `1e200` have their right norm, where PyTorch,
/// TensorFlow and optax give infinity and 0. The bits do not depend on the number of threads.
///
/// Returns NaN if any element is NaN, else infinity if any is infinite, or if the norm of finite
/// elements passes f64's maximum (they are still clipped by their right coefficient, which is 0
/// where f64 does not hold it).
///
/// # Errors
/// An invalid `norm_type`; a gradient whose shape, dtype or device is not its Var's, or whose dtype
/// is not one of the four; a store that has gradients, but none for any of `vars`.
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
pub fn total_norm(grads: &GradStore, vars: &[Var], norm_type: NormType) -> Result<f64> {
    let request = Request::norm(check_norm_type(norm_type)?);
    check_any_match(vars, grads)?;
    Ok(measure(VarList::unnamed(vars), grads, request)?.total_norm())
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
    /// The limit: 0 (all gradients become 0) or above; infinite to measure only. Default: 1.
    pub max_norm: f64,
    /// The norm that is limited. Default: L2.
    pub norm_type: NormType,
    /// What is added to the norm before it is divided by. Default: 1e-6.
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

/// Scales the gradients of `vars` in place, so that their global L2 norm is at most `max_norm` (up
/// to the dtype's rounding): `g * min(1, max_norm / (total_norm + 1e-6))`. Returns the norm before.
///
/// Gradients of any shape, in f32, f64, f16 or bf16, mixed, on any devices. A coefficient of
/// exactly 1 writes nothing, `max_norm` 0 gives zero gradients, and an infinite one measures only
/// (PyTorch can write NaN then).
///
/// "In place" holds, on CPU and CUDA, for the caller's clones of a gradient too. A gradient gets
/// storage of its own if it is a Var, if it shares storage with one of `vars` or with an entry of
/// the store that `vars` do not name, or if it is not contiguous. Where gradients of several of
/// `vars` share storage, the first contiguous one keeps it: what else the caller has in that
/// storage, such as the tensor that it is a view of, changes there. The others get storage of their
/// own. So nothing is scaled twice and no weight is touched. (On other devices every entry that
/// changes is replaced.) Two threads should not clip one gradient at the same time: both measure
/// it, and it may be scaled twice.
///
/// # Errors
/// A `max_norm` below 0 or NaN; gradients that are not finite (the error names the first bad Var);
/// a store that has gradients, but none for any of `vars` (an empty store, or no Vars, is no
/// error); a gradient whose shape, dtype or device is not its Var's, or whose dtype is not one of
/// the four. Nothing is changed then.
///
/// # References
/// `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15), but for `error_if_nonfinite`, false there.
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
pub fn clip_grad_norm(grads: &mut GradStore, vars: &[Var], max_norm: f64) -> Result<f64> {
    clip_grad_norm_with(
        grads,
        vars,
        &ClipGradNorm {
            max_norm,
            ..ClipGradNorm::default()
        },
    )
}

/// As [`clip_grad_norm`], with the norm's order, `eps` and the policy for what is not finite.
///
/// Under [`NonFinite::Zero`] the norm returned is that of the finite elements; under
/// [`NonFinite::SkipStep`] gradients that are not finite are left alone.
///
/// # Errors
/// As [`clip_grad_norm`]; an invalid `norm_type` or `eps`; elements that are not finite only under
/// [`NonFinite::Error`].
///
/// # References
/// `torch.nn.utils.clip_grad_norm_` (PyTorch 2.15).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::{ClipGradNorm, NormType, clip_grad_norm_with};
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f64, 4.0], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// let options = ClipGradNorm { max_norm: 2.0, norm_type: NormType::Inf, ..Default::default() };
/// assert_eq!(clip_grad_norm_with(&mut grads, &[w], &options)?, 4.0);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_norm_with(
    grads: &mut GradStore,
    vars: &[Var],
    options: &ClipGradNorm,
) -> Result<f64> {
    check_bound("max_norm", options.max_norm)?;
    check_not_negative("eps", options.eps)?;
    let request = Request::norm(check_norm_type(options.norm_type)?);
    check_any_match(vars, grads)?;
    let vars = VarList::unnamed(vars);
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

/// Scales the gradients of `vars` in place for a `total_norm` that is already known:
/// `g * min(1, max_norm / (total_norm + 1e-6))`.
///
/// For a norm over more than these Vars: over several stores, or several processes. In place means
/// the same as for [`clip_grad_norm`], gradients that share storage included. NaN elements stay
/// NaN.
///
/// # Errors
/// A `max_norm` below 0 or NaN; a `total_norm` that is negative or not finite; a gradient that does
/// not fit its Var; a store that has gradients, but none for any of `vars`. Nothing is changed
/// then.
///
/// # References
/// `torch.nn.utils.clip_grads_with_norm_` (PyTorch 2.15), which takes any `total_norm`.
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
    vars: &[Var],
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
    check_any_match(vars, grads)?;
    let clip_coef = Norm::known(total_norm).clip_coef(max_norm, CLIP_EPS);
    let vars = VarList::unnamed(vars);
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

/// Clips every element of the gradients of `vars` into `[-clip_value, clip_value]`, in place.
///
/// Infinite elements become the bound and NaN stays NaN, on every device. Unlike a norm clip this
/// turns the gradient: (3, 4) at 1 becomes (1, 1). The bound is rounded to the gradient's dtype: in
/// f16 one of 1e5 is infinite and changes nothing, and one of 1e-9 is 0. In place means the same as
/// for [`clip_grad_norm`], gradients that share storage included. Nothing is measured: one pass.
///
/// # Errors
/// A `clip_value` below 0 or NaN; a gradient whose shape, dtype or device is not its Var's, or
/// whose dtype is not one of the four; a store that has gradients, but none for any of `vars`.
/// Nothing is changed then.
///
/// # References
/// `torch.nn.utils.clip_grad_value_` (PyTorch 2.15).
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_grad_clip::clip_grad_value;
///
/// # fn main() -> candle_grad_clip::Result<()> {
/// let w = Var::new(&[3f32, 4.0], &Device::Cpu)?;
/// let mut grads = (w.sqr()?.sum_all()? / 2.0)?.backward()?;
/// clip_grad_value(&mut grads, &[w.clone()], 1.0)?;
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [1.0, 1.0]);
/// # Ok(())
/// # }
/// ```
pub fn clip_grad_value(grads: &mut GradStore, vars: &[Var], clip_value: f64) -> Result<()> {
    check_bound("clip_value", clip_value)?;
    check_any_match(vars, grads)?;
    let vars = VarList::unnamed(vars);
    let mut entries = walk(vars, grads, None)?;
    if clip_value == f64::INFINITY {
        return Ok(());
    }
    // candle's operations can't clamp what is not finite.
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

/// TensorFlow's clip by global norm: leaves `grads` alone, and returns a store with the clipped
/// gradients, and the norm. `g * clip_norm / max(total_norm, clip_norm)`, without an eps.
///
/// `use_norm` is the norm to clip by if it is already known. The store also holds the gradients of
/// everything that is not in `vars`, as they were; what is not changed shares its storage with
/// `grads`. As in TensorFlow, a norm that is not finite gives NaN in every gradient of `vars`,
/// unless `clip_norm` is infinite, which changes nothing. A `clip_norm` of 0 gives zeros (in
/// TensorFlow NaN where the norm is 0 too).
///
/// # Errors
/// A `clip_norm` or `use_norm` below 0 or NaN; a gradient whose shape, dtype or device is not its
/// Var's, or whose dtype is not one of the four; a store that has gradients, but none for any of
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
    vars: &[Var],
    clip_norm: f64,
    use_norm: Option<f64>,
) -> Result<(GradStore, f64)> {
    check_bound("clip_norm", clip_norm)?;
    check_any_match(vars, grads)?;
    let vars = VarList::unnamed(vars);
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
