//! The sums of the gradients, in full precision.

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use candle_grad_clip_kernels::Edit;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::backend::{self, Backends};
use crate::candle_versions::empty_store;
use crate::error::Result;
use crate::gradients::{Entry, Residency};
use crate::pipeline::collect::{copies_of_unreadable, readable};
use crate::pipeline::edit::run_all;
use crate::tensors::{storage_address, wide_dtype};
use crate::vars::NamedVars;

/// One sum for each Var.
pub(super) struct Sums {
    of_vars: Vec<Sum>,
    /// Where their buffers on CPU are.
    storages: FxHashSet<usize>,
}

/// The sum of one Var's gradients.
#[derive(Default)]
struct Sum {
    /// In full precision; what it holds counts only with `has_grad`.
    wide: Option<Tensor>,
    /// Room for the result, for half-precision Vars on CPU.
    rounded: Option<Tensor>,
    has_grad: bool,
}

impl Sums {
    pub(super) fn new(len: usize) -> Self {
        Self {
            of_vars: (0..len).map(|_| Sum::default()).collect(),
            storages: FxHashSet::default(),
        }
    }

    /// Adds the gradients of one micro-batch, as `edit` makes them.
    pub(super) fn add(
        &mut self,
        vars: &NamedVars,
        entries: &[Entry<'_>],
        edit: Edit,
    ) -> Result<()> {
        let elsewhere = self.add_elsewhere(entries, edit)?;
        let owned = copies_of_unreadable(entries, &self.storages)?;
        self.make_buffers(vars, entries)?;
        // From here on nothing is expected to fail.
        self.add_on_cpu(vars, entries, &owned, edit)?;
        for (index, wide) in elsewhere {
            self.of_vars[index].wide = Some(wide);
        }
        for (sum, entry) in self.of_vars.iter_mut().zip(entries) {
            sum.has_grad |= entry.grad.is_some();
        }
        Ok(())
    }

    /// Starts anew, with the same buffers.
    pub(super) fn clear(&mut self) {
        for sum in &mut self.of_vars {
            sum.has_grad = false;
        }
    }

    /// The next sums of the Vars that candle's operations add up.
    fn add_elsewhere(&self, entries: &[Entry<'_>], edit: Edit) -> Result<Vec<(usize, Tensor)>> {
        let mut sums = Vec::new();
        for (index, (entry, sum)) in entries.iter().zip(&self.of_vars).enumerate() {
            if let (Some(grad), Residency::Elsewhere) = (entry.grad, entry.residency) {
                let before = sum.wide.as_ref().filter(|_| sum.has_grad);
                let sum = backend::candle_ops::accumulate(before, grad, edit, entry.is_finite())?;
                sums.push((index, sum));
            }
        }
        Ok(sums)
    }

    /// The buffers of the Vars on CPU that get a gradient for the first time.
    fn make_buffers(&mut self, vars: &NamedVars, entries: &[Entry<'_>]) -> Result<()> {
        for ((entry, sum), var) in entries.iter().zip(&mut self.of_vars).zip(vars.vars()) {
            if entry.grad.is_none() || entry.residency == Residency::Elsewhere {
                continue;
            }
            let wide = wide_dtype(var.dtype());
            let mut make = |place: &mut Option<Tensor>, dtype: DType| -> Result<()> {
                if place.is_none() {
                    let buffer = Tensor::zeros(var.shape(), dtype, var.device())?;
                    self.storages.insert(storage_address(&buffer));
                    *place = Some(buffer);
                }
                Ok(())
            };
            make(&mut sum.wide, wide)?;
            if wide != var.dtype() {
                make(&mut sum.rounded, var.dtype())?;
            }
        }
        Ok(())
    }

    fn add_on_cpu(
        &self,
        vars: &NamedVars,
        entries: &[Entry<'_>],
        owned: &FxHashMap<usize, Tensor>,
        edit: Edit,
    ) -> Result<()> {
        let mut jobs = Vec::with_capacity(entries.len());
        for (index, (entry, sum)) in entries.iter().zip(&self.of_vars).enumerate() {
            if let (Some(grad), Some(wide)) = (readable(entry), &sum.wide) {
                let grad = owned.get(&index).unwrap_or(grad);
                jobs.push((entry.elements, grad, wide, !sum.has_grad));
            }
        }
        run_all(
            &jobs,
            vars.list().work,
            |(elements, ..)| *elements,
            |(_, grad, ..)| grad,
            |(_, grad, wide, is_first)| backend::cpu::accumulate(wide, grad, edit, *is_first),
        )
    }

    /// A store with all sums times `coef`, in the Vars' dtypes.
    pub(super) fn rounded(&self, vars: &NamedVars, coef: f64) -> Result<GradStore> {
        let backends = Backends::current();
        let mut store = empty_store()?;
        let mut jobs = Vec::with_capacity(self.of_vars.len());
        for (sum, var) in self.of_vars.iter().zip(vars.vars()) {
            let Some(wide) = sum.wide.as_ref().filter(|_| sum.has_grad) else {
                continue;
            };
            let result = match (backends.residency(wide), &sum.rounded) {
                (Residency::Cpu, Some(rounded)) => rounded,
                (Residency::Cpu, None) if wide.dtype() == var.dtype() => wide,
                _ => {
                    store.insert(var, backend::candle_ops::round(wide, coef, var.dtype())?);
                    continue;
                }
            };
            store.insert(var, result.clone());
            let elements = var.elem_count();
            if elements > 0 {
                jobs.push((elements, wide, result));
            }
        }
        let scale = Edit::Scale {
            clip_coef: coef,
            zero_non_finite: false,
        };
        run_all(
            &jobs,
            vars.list().work,
            |(elements, ..)| *elements,
            |(_, wide, _)| wide,
            |(_, wide, result)| match result.dtype() == wide.dtype() {
                true if coef == 1.0 => Ok(()),
                true => backend::cpu::edit_in_place(wide, scale.into()),
                false => backend::cpu::round(result, wide, coef),
            },
        )?;
        Ok(store)
    }
}
