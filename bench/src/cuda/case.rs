//! One gradient set in one dtype on a GPU: ours, pasted code and the floor, and whether what they did is right.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::answer::{Answer, Question, SAMPLES};
use crate::cuda::gpu::Gpu;
use crate::cuda::steps::{self, Call, Norm};
use crate::cuda::task::{Start, Task};
use crate::element::Element;
use crate::op::{PARAMS_SCALE, PARAMS_START, uniform};
use crate::sets::Set;

/// Relative error that our norms may have on a GPU; those of pasted code are summed in f32.
const NORM_TOLERANCE: f64 = 1e-9;
/// Sets larger than this are checked by their norms and samples, without the sum of all elements.
const LARGE: usize = 1 << 28;

/// Who does it on this side; PyTorch has a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Impl {
    CandleGradClip,
    StepAlone,
    PasteIn,
    Floor,
}

impl Impl {
    const ALL: [Self; 4] = [
        Self::CandleGradClip,
        Self::StepAlone,
        Self::PasteIn,
        Self::Floor,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::CandleGradClip => "candle-grad-clip",
            Self::StepAlone => "candle-grad-clip, step alone",
            Self::PasteIn => "paste-in",
            Self::Floor => "floor",
        }
    }

    fn does(self, task: Task) -> bool {
        self != Self::StepAlone || task == Task::NoneSgd
    }

    fn question<E: Element>(self, task: Task, shapes: &[Vec<usize>]) -> Question {
        let mut question = task.question::<E>(shapes);
        if self != Self::PasteIn {
            question.norm_tolerance = NORM_TOLERANCE;
        }
        question
    }
}

/// A gradient set in dtype `E` on a GPU.
pub(crate) struct Case<E> {
    set: Set,
    shapes: Vec<Vec<usize>>,
    vars: Vec<Var>,
    /// What gradients are before each call.
    fresh: Vec<Tensor>,
    grads: GradStore,
    elements: usize,
    task: Task,
    calls: Vec<(Impl, Call)>,
    total_norm: f64,
    dtype: std::marker::PhantomData<E>,
}

impl<E: Element> Case<E> {
    /// The bytes of parameters, gradients and a copy of those.
    pub(crate) fn bytes(set: Set) -> usize {
        let elements = |shape: &Vec<usize>| shape.iter().product::<usize>();
        3 * size_of::<E>() * set.shapes().iter().map(elements).sum::<usize>()
    }

    pub(crate) fn new(set: Set, device: &Device) -> Result<Self> {
        let shapes = set.shapes();
        let mut fresh = Vec::with_capacity(shapes.len());
        let mut vars = Vec::with_capacity(shapes.len());
        let mut elements = 0;
        for shape in &shapes {
            let grad = tensor::<E>(shape, elements as u64, 1.0, device)?;
            elements += grad.elem_count();
            fresh.push(grad);
            vars.push(Var::zeros(shape.as_slice(), E::DTYPE, device)?);
        }
        let total_norm = Task::TotalNorm.question::<E>(&shapes).norms[0];
        Ok(Self {
            set,
            shapes,
            vars,
            fresh,
            grads: GradStore::default(),
            elements,
            task: Task::TotalNorm,
            calls: Vec::new(),
            total_norm,
            dtype: std::marker::PhantomData,
        })
    }

    /// Checks what everybody here does who finds room, and makes ready for timing; returns who takes part, and notes on
    /// who does not.
    pub(crate) fn begin(&mut self, task: Task, gpu: &Gpu) -> Result<(Vec<Impl>, Vec<String>)> {
        self.task = task;
        let mut notes = Vec::new();
        let mut rivals = Vec::new();
        self.calls.clear();
        self.grads = GradStore::default();
        let mut free = gpu.free_bytes()?;
        for rival in Impl::ALL.into_iter().filter(|rival| rival.does(task)) {
            let needs = self.bytes_of(rival);
            if needs > free {
                notes.push(format!(
                    "{}: no {} on {} in {}, as it needs {:.1} GB more than {:.1} GB",
                    rival.name(),
                    task.name(),
                    self.set.name(),
                    E::DTYPE.as_str(),
                    (needs - free) as f64 / 1e9,
                    free as f64 / 1e9,
                ));
                continue;
            }
            free -= needs;
            rivals.push(rival);
        }
        for rival in &rivals {
            let what = || format!("{} of {}", task.name(), rival.name());
            self.check(*rival).with_context(what)?;
        }
        self.prepare(&rivals)?;
        Ok((rivals, notes))
    }

    /// One call: gradients as backward leaves them, then the clock, then a look at the norm.
    pub(crate) fn time(&mut self, rival: Impl, start: Start, gpu: &mut Gpu) -> Result<f64> {
        let is_cold = self.set.is_cold();
        if rival == Impl::Floor {
            let bytes = self.bytes_moved();
            return Ok(gpu.time(start, is_cold, |gpu| gpu.move_bytes(bytes))?.0);
        }
        self.refresh()?;
        let (grads, calls) = (&mut self.grads, &mut self.calls);
        let call = call_of(calls, rival)?;
        let (ms, norm) = gpu.time(start, is_cold, |_| call(grads))?;
        self.check_norm(rival, &norm)?;
        Ok(ms)
    }

    /// What the task at hand has to read and write.
    pub(crate) fn bytes_moved(&self) -> usize {
        self.task.bytes_moved::<E>(self.elements)
    }

    /// The bytes that `rival` takes beside what is there already.
    fn bytes_of(&self, rival: Impl) -> usize {
        let largest = self.fresh.iter().map(Tensor::elem_count).max();
        match rival {
            Impl::CandleGradClip => steps::bytes_of_ours(self.task, self.elements),
            Impl::PasteIn => steps::bytes_of_pasted(
                self.task,
                size_of::<E>() * self.elements,
                size_of::<f32>() * largest.unwrap_or(0),
            ),
            Impl::StepAlone | Impl::Floor => 0,
        }
    }

    /// Parameters and optimizers as at the start of training.
    fn prepare(&mut self, rivals: &[Impl]) -> Result<()> {
        self.calls.clear();
        if self.task.op().is_step() {
            let mut start = PARAMS_START;
            for var in &self.vars {
                var.set(&tensor::<E>(var.dims(), start, PARAMS_SCALE, var.device())?)?;
                start += var.elem_count() as u64;
            }
        }
        for rival in rivals {
            let (task, vars) = (self.task, self.vars.clone());
            let max_norm = rival.question::<E>(task, &self.shapes).max_norm;
            let call = match rival {
                Impl::CandleGradClip => steps::ours(task, vars, max_norm)?,
                Impl::StepAlone => steps::step_alone(vars)?,
                Impl::PasteIn => steps::pasted(task, vars, max_norm)?,
                Impl::Floor => continue,
            };
            self.calls.push((*rival, call));
        }
        Ok(())
    }

    /// Calls once, or for steps twice, from the start, and compares the results with f64 arithmetic.
    ///
    /// `AdamW`'s first step is the same for any coefficient. The second shows it: half the gradient is below the
    /// limit.
    fn check(&mut self, rival: Impl) -> Result<()> {
        if rival == Impl::Floor {
            return Ok(()); // it steps nowhere in particular
        }
        self.prepare(&[rival])?;
        self.refresh()?;
        let norm = call_of(&mut self.calls, rival)?(&mut self.grads)?;
        self.check_norm(rival, &norm)?;
        if self.task.op().is_step() {
            for (var, fresh) in self.vars.iter().zip(&self.fresh) {
                self.grads.insert(var, (fresh * 0.5)?);
            }
            call_of(&mut self.calls, rival)?(&mut self.grads)?;
        }
        let after: Vec<&Tensor> = if self.task.op().is_step() {
            self.vars.iter().map(Var::as_tensor).collect()
        } else {
            let grads = self.vars.iter().map(|var| self.grads.get(var));
            grads.collect::<Option<_>>().context("a gradient is gone")?
        };
        let is_large = self.elements > LARGE;
        let answer = answer::<E>(&after, self.elements, norm.value()?, !is_large)?;
        let question = rival.question::<E>(self.task, &self.shapes);
        if is_large {
            question.check_samples::<E>(&answer)?;
        } else {
            question.check::<E>(&answer)?;
        }
        self.grads = GradStore::default();
        self.calls.clear();
        Ok(())
    }

    fn check_norm(&self, rival: Impl, norm: &Norm) -> Result<()> {
        let Some(norm) = norm.value()? else {
            return Ok(());
        };
        let tolerance = if rival == Impl::PasteIn {
            crate::answer::NORM_TOLERANCE
        } else {
            NORM_TOLERANCE
        };
        ensure!(
            (norm / self.total_norm - 1.0).abs() <= tolerance,
            "its norm is {norm}, not {}",
            self.total_norm
        );
        Ok(())
    }

    /// New tensors for what a call writes over, as a backward pass makes them. Steps write to no gradient: pasted code puts
    /// others into the store.
    fn refresh(&mut self) -> Result<()> {
        for (var, fresh) in self.vars.iter().zip(&self.fresh) {
            let grad = if self.task == Task::ClipGradNorm {
                fresh.copy()?
            } else {
                fresh.clone()
            };
            self.grads.insert(var, grad);
        }
        Ok(())
    }
}

fn call_of(calls: &mut [(Impl, Call)], rival: Impl) -> Result<&mut Call> {
    let call = calls.iter_mut().find(|(of, _)| *of == rival);
    Ok(&mut call.context("the task is not prepared")?.1)
}

/// The numbers that all sides work out for themselves, from index `start` on.
fn tensor<E: Element>(shape: &[usize], start: u64, scale: f64, device: &Device) -> Result<Tensor> {
    let elements = shape.iter().product::<usize>() as u64;
    let values: Vec<E> = (start..start + elements)
        .into_par_iter()
        .map(|i| E::from_f64(scale * uniform(i)))
        .collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// What a call left behind, as a peer says it.
fn answer<E: Element>(
    tensors: &[&Tensor],
    elements: usize,
    norm: Option<f64>,
    with_sum: bool,
) -> Result<Answer> {
    let stride = (elements / SAMPLES).max(1);
    let (mut samples, mut sum) = (Vec::new(), 0.0);
    let (mut start, mut next) = (0, 0);
    for tensor in tensors {
        let values = tensor.flatten_all()?.to_vec1::<E>()?;
        if with_sum {
            sum += values.par_iter().map(|x| x.to_f64()).sum::<f64>();
        }
        while let Some(x) = values.get(next - start) {
            samples.push(x.to_f64() as f32);
            next += stride;
        }
        start += values.len();
    }
    Ok(Answer { norm, sum, samples })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// All but the clock, on the CPU.
    fn check<E: Element>(task: Task, rival: Impl) -> Result<()> {
        let mut case = Case::<E>::new(Set::D, &Device::Cpu)?;
        case.task = task;
        case.check(rival)
    }

    #[test]
    fn every_rival_does_every_task_right() -> Result<()> {
        for task in Task::ALL {
            for rival in Impl::ALL.into_iter().filter(|rival| rival.does(task)) {
                let what = || format!("{task:?} {rival:?}");
                check::<f32>(task, rival).with_context(what)?;
                check::<bf16>(task, rival).with_context(what)?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_wrong_norm_and_a_wrong_gradient_are_found() -> Result<()> {
        let mut case = Case::<f32>::new(Set::D, &Device::Cpu)?;
        case.total_norm *= 1.0 + 1e-5;
        assert!(case.check(Impl::CandleGradClip).is_err());
        for task in Task::ALL {
            let mut case = Case::<f32>::new(Set::D, &Device::Cpu)?;
            case.task = task;
            case.fresh[2] = case.fresh[2].zeros_like()?;
            assert!(case.check(Impl::PasteIn).is_err(), "{task:?}");
        }
        Ok(())
    }

    #[test]
    fn samples_are_every_so_many_th_of_all() -> Result<()> {
        let tensor = |range: std::ops::Range<u16>| {
            let values: Vec<f32> = range.map(f32::from).collect();
            Tensor::new(values, &Device::Cpu)
        };
        let tensors = [
            tensor(0..5000)?,
            tensor(5000..5001)?,
            tensor(5001..9001)?,
            tensor(9001..9008)?,
        ];
        let answer = answer::<f32>(&tensors.each_ref(), 9008, None, true)?;
        let expected: Vec<f32> = (0..9008u16).step_by(2).map(f32::from).collect();
        assert_eq!(answer.samples, expected);
        Ok(())
    }
}
