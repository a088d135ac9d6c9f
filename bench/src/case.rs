//! One gradient set in one dtype: what the rivals of this program do to it, and whether that is
//! right.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use rayon::prelude::*;

use crate::answer::{Answer, NORM_TOLERANCE, Question};
use crate::calls::{self, Call};
use crate::element::Element;
use crate::op::{Impl, Op, PARAMS_SCALE, PARAMS_START, uniform};
use crate::rival::Rival;

/// Where gradients are, and the clock beside them.
pub(crate) trait Machine<E: Element> {
    /// Relative error that our norms may have; those of pasted code are summed in f32.
    const NORM_TOLERANCE: f64;
    /// Error that two of our steps may have, as a share of the learning rate.
    const STEP_TOLERANCE: f64;
    fn device(&self) -> Device;
    /// Takes the next Var's gradient.
    fn add(&mut self, var: &Var, values: Vec<E>) -> Result<()>;
    /// A Var's gradient as it is before each call.
    fn fresh(&self, index: usize, shape: &[usize]) -> Result<Tensor>;
    /// What `rival` works on.
    fn grads(&self, rival: Impl) -> &GradStore;
    /// Makes ready for an operation, as at the start of training.
    fn prepare(&mut self, op: Op, vars: &[Var]);
    /// Gradients as backward leaves them, then the clock: the milliseconds of a call, and its norm.
    fn time(
        &mut self,
        rival: Impl,
        op: Op,
        vars: &[Var],
        call: &mut Call,
    ) -> Result<(f64, Option<f64>)>;
    /// The same of the floor; `coef` is what a norm clip scales by.
    fn time_floor(&mut self, op: Op, vars: &[Var], coef: f64) -> Result<f64>;
}

/// A gradient set in dtype `E`.
pub(crate) struct Case<E, M> {
    pub(crate) shapes: Vec<Vec<usize>>,
    vars: Vec<Var>,
    pub(crate) machine: M,
    /// With an answer to each operation.
    pub(crate) question: Question,
    /// The operation at hand, and what those who take part do.
    op: Op,
    calls: Vec<(Impl, Call)>,
    dtype: std::marker::PhantomData<E>,
}

impl<E: Element, M: Machine<E>> Case<E, M> {
    pub(crate) fn new(shapes: Vec<Vec<usize>>, mut machine: M) -> Result<Self> {
        let mut start = 0;
        let mut vars = Vec::with_capacity(shapes.len());
        for shape in &shapes {
            let var = Var::zeros(shape.as_slice(), E::DTYPE, &machine.device())?;
            machine.add(&var, numbers(start, var.elem_count(), 1.0))?;
            start += var.elem_count() as u64;
            vars.push(var);
        }
        Ok(Self {
            question: Question::new::<E>(&shapes, false),
            shapes,
            vars,
            machine,
            op: Op::TotalNorm,
            calls: Vec::new(),
            dtype: std::marker::PhantomData,
        })
    }

    /// Ends what was at hand.
    pub(crate) fn clear(&mut self) {
        self.calls.clear();
    }

    /// One call, then a look at the norm.
    fn time(&mut self, rival: Impl) -> Result<f64> {
        let (op, vars) = (self.op, self.vars.as_slice());
        if rival == Impl::Floor {
            let coef = self.question.about(op).clip_coef();
            return self.machine.time_floor(op, vars, coef);
        }
        let mut calls = self.calls.iter_mut();
        let call = calls.find(|(of, _)| *of == rival);
        let (_, call) = call.context("the operation is not prepared")?;
        let (ms, norm) = self.machine.time(rival, op, vars, call)?;
        if let Some(norm) = norm {
            let total_norm = self.question.norms[0];
            ensure!(
                (norm / total_norm - 1.0).abs() <= norm_tolerance::<E, M>(rival),
                "{} gives a norm of {norm}, not {total_norm}",
                rival.name()
            );
        }
        Ok(ms)
    }

    /// A second step, with half the gradients. `AdamW`'s first is the same for any coefficient. The
    /// second shows it: half the gradient is below the limit.
    fn step_with_half(&mut self, rival: Impl) -> Result<()> {
        let mut halves = GradStore::default();
        for (i, var) in self.vars.iter().enumerate() {
            let half = (self.machine.fresh(i, var.dims())? * 0.5)?;
            halves.insert(var, half);
        }
        for (_, call) in self.calls.iter_mut().filter(|(of, _)| *of == rival) {
            call(&mut halves)?;
        }
        Ok(())
    }

    /// The elements at `places`, after a call.
    fn elements(&self, rival: Impl, places: &[usize]) -> Result<Vec<f64>> {
        let grads = self.machine.grads(rival);
        let mut places = places.iter().copied().peekable();
        let (mut start, mut elements) = (0, Vec::new());
        for var in &self.vars {
            let tensor = if self.op.is_step() {
                var.as_tensor()
            } else {
                grads.get(var).context("a gradient is gone")?
            };
            let values = tensor.flatten_all()?.to_vec1::<E>()?;
            let end = start + values.len();
            while let Some(place) = places.next_if(|place| *place < end) {
                elements.push(values[place - start].to_f64());
            }
            start = end;
        }
        Ok(elements)
    }
}

impl<E: Element, M: Machine<E>> Rival<Case<E, M>> for Impl {
    fn name(&self) -> &str {
        Impl::name(*self)
    }

    fn question(&self, case: &Case<E, M>, op: Op) -> Question {
        let steps = match (self, size_of::<E>()) {
            // candle keeps moments in the parameters' dtype: 8 bits of the step are right.
            (Self::PasteIn, 2) => 0.1,
            (Self::PasteIn, _) => 2e-2, // of its norm
            _ => M::STEP_TOLERANCE,
        };
        let question = case.question.about(op);
        question.here(*self, norm_tolerance::<E, M>(*self), steps)
    }

    fn prepare(&mut self, case: &mut Case<E, M>, question: &Question) -> Result<()> {
        case.op = question.op;
        if case.op.is_step() {
            let mut start = PARAMS_START;
            for var in &case.vars {
                let values = numbers::<E>(start, var.elem_count(), PARAMS_SCALE);
                var.set(&Tensor::from_vec(values, var.dims(), var.device())?)?;
                start += var.elem_count() as u64;
            }
        }
        case.machine.prepare(case.op, &case.vars);
        let call = calls::call(*self, case.op, &case.vars, question.max_norm)?;
        case.calls.extend(call.map(|call| (*self, call)));
        Ok(())
    }

    fn answer(&mut self, case: &mut Case<E, M>, question: &Question) -> Result<Option<Answer>> {
        let is_step = question.op.is_step();
        if *self == Self::Floor && is_step {
            return Ok(None); // it steps nowhere in particular
        }
        case.clear();
        self.prepare(case, question)?;
        case.time(*self)?;
        if is_step {
            case.step_with_half(*self)?;
        }
        let samples = case.elements(*self, &question.places())?;
        case.clear();
        Ok(Some(Answer {
            norm: None, // compared after every call
            sum: f64::NAN,
            samples,
        }))
    }

    fn time(&mut self, case: &mut Case<E, M>, calls: usize) -> Result<Vec<f64>> {
        (0..calls).map(|_| case.time(*self)).collect()
    }
}

fn norm_tolerance<E: Element, M: Machine<E>>(rival: Impl) -> f64 {
    match rival {
        Impl::PasteIn => NORM_TOLERANCE,
        _ => M::NORM_TOLERANCE,
    }
}

/// The numbers that all sides work out for themselves, from index `start` on.
fn numbers<E: Element>(start: u64, len: usize, scale: f64) -> Vec<E> {
    // By usize, so that no thread has its own vector: where tensors lie in memory counts in
    // small sets.
    let indices = (0..len).into_par_iter();
    let number = |i| E::from_f64(scale * uniform(start + i as u64));
    indices.map(number).collect()
}
