//! Where PyTorch's AdamW and SGD end: see `tests/cases/README.md`.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use support::cases::{Number, assert_none, at_least};
use support::device::kernels;

use candle_core::DType;
use candle_grad_clip::backend::{self, Backend};
use support::optimizer_cases::{self, Hyper, Limit, OptimCase, OptimTensor, WAYS, Way};
use support::optimizer_differences::Difference;

fn cases() -> &'static [OptimCase] {
    static CASES: LazyLock<Vec<OptimCase>> =
        LazyLock::new(|| optimizer_cases::all().unwrap().cases);
    &CASES
}

/// What is wrong with a run of `run`, beside what `case` expects.
fn faults(case: &OptimCase, run: &OptimCase, way: Way, backend: Backend) -> Vec<String> {
    match backend::with_backend(backend, || run.run(way)) {
        Ok(outcome) => {
            let differences = case.differences(&outcome);
            let faults = differences.into_iter().filter(Difference::is_fault);
            let in_words = |one: Difference| {
                format!("{} ({:.3} of what is allowed)", one.what, one.of_allowed)
            };
            faults.map(in_words).collect()
        }
        Err(error) => vec![error.to_string()],
    }
}

fn name(optimizer: Hyper) -> &'static str {
    match optimizer {
        Hyper::AdamW(_) => "AdamW",
        Hyper::Sgd(_) => "SGD",
    }
}

/// Runs all cases in all ways, lists those that end elsewhere, and prints the worst differences.
fn every_case_agrees_on(backend: Backend) {
    let (mut runs, mut numbers) = (0, 0);
    let (mut failures, mut worst) = (Vec::new(), BTreeMap::<String, f64>::new());
    for case in cases() {
        for way in WAYS.into_iter().filter(|way| case.can_run(*way)) {
            runs += 1;
            let outcome = match backend::with_backend(backend, || case.run(way)) {
                Ok(outcome) => outcome,
                Err(error) => {
                    failures.push(format!("{} {way:?}: {error}", case.id));
                    continue;
                }
            };
            for one in case.differences(&outcome) {
                numbers += 1;
                let of = one.dtype.map_or("norm", |dtype| dtype.as_str());
                let most = worst.entry(format!("{} {of}", name(case.optimizer)));
                let most = most.or_default();
                *most = most.max(one.of_allowed);
                if one.is_fault() {
                    failures.push(format!(
                        "{} {way:?}: {} ({:.3} of what is allowed)",
                        case.id, one.what, one.of_allowed
                    ));
                }
            }
        }
    }
    println!("{backend:?}: {runs} runs, worst as a share of what is allowed: {worst:.3?}");
    assert_none(
        &failures,
        numbers,
        &format!("numbers differ on {backend:?}"),
    );
    assert!(runs >= 900, "only {runs} runs");
    assert!(numbers >= 9_000, "only {numbers} numbers were compared");
    assert_eq!(worst.len(), 10, "both optimizers, four dtypes and the norm");
}

#[test]
fn every_case_agrees_on_cpu() {
    every_case_agrees_on(kernels());
}

#[test]
fn every_case_agrees_on_candle_ops() {
    every_case_agrees_on(Backend::CandleOps);
}

/// Asserts that at least so many cases are of a kind.
fn of(least: usize, what: &str, is: impl Fn(&OptimCase) -> bool) {
    at_least(least, what, cases(), is);
}

fn any(case: &OptimCase, is: impl Fn(&OptimTensor) -> bool) -> bool {
    case.tensors.iter().any(is)
}

#[test]
fn the_cases_are_many_and_of_every_kind() {
    let file = optimizer_cases::all().unwrap();
    assert_eq!((&*file.framework, &*file.version), ("pytorch", "2.15.0"));
    assert_eq!(file.eps, Some(1e-6));
    of(300, "in all", |_| true);
    of(
        50,
        "of AdamW with amsgrad",
        |case| matches!(case.optimizer, Hyper::AdamW(hyper) if hyper.amsgrad),
    );
    of(
        50,
        "of AdamW without amsgrad",
        |case| matches!(case.optimizer, Hyper::AdamW(hyper) if !hyper.amsgrad),
    );
    of(
        50,
        "of SGD without momentum",
        |case| matches!(case.optimizer, Hyper::Sgd(hyper) if hyper.momentum == 0.0),
    );
    of(
        50,
        "with dampening",
        |case| matches!(case.optimizer, Hyper::Sgd(hyper) if hyper.momentum > 0.0 && hyper.dampening > 0.0),
    );
    of(
        50,
        "of Nesterov's momentum",
        |case| matches!(case.optimizer, Hyper::Sgd(hyper) if hyper.nesterov),
    );
    let weight_decay = |case: &OptimCase| match case.optimizer {
        Hyper::AdamW(hyper) => hyper.weight_decay,
        Hyper::Sgd(hyper) => hyper.weight_decay,
    };
    of(50, "without weight decay", |case| weight_decay(case) == 0.0);
    of(50, "with a large weight decay", |case| {
        weight_decay(case) >= 2.0
    });
}

#[test]
fn the_cases_have_every_dtype_clip_and_length() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        of(60, &format!("with {dtype:?}"), |case| {
            any(case, |one| one.dtype == dtype)
        });
    }
    of(60, "of halves with master weights", |case| {
        case.master_weights && case.has_halves()
    });
    of(60, "of halves without", |case| {
        !case.master_weights && case.has_halves()
    });
    of(80, "clipped by norm", |case| {
        matches!(case.clip, Some(Limit::Norm(_)))
    });
    of(80, "clipped by value", |case| {
        matches!(case.clip, Some(Limit::Value(_)))
    });
    of(80, "not clipped", |case| case.clip.is_none());
    for steps in [1, 2, 3, 5, 8, 20] {
        of(30, &format!("of {steps} steps"), |case| {
            case.steps() == steps
        });
    }
    of(10, "with a schedule", |case| case.lrs.is_some());
}

#[test]
fn the_cases_have_gradients_of_every_kind() {
    of(50, "with a missing gradient", |case| {
        any(case, |one| one.grads.iter().any(Option::is_none))
    });
    of(20, "with a parameter that never gets one", |case| {
        any(case, |one| one.grads.iter().all(Option::is_none))
    });
    of(50, "with a scalar", |case| {
        any(case, |one| one.shape.is_empty())
    });
    of(50, "with a tensor of zero elements", |case| {
        any(case, |one| one.shape.contains(&0))
    });
    of(15, "that end in numbers that are not finite", |case| {
        any(case, |one| one.end.iter().any(|x| !x.0.is_finite()))
    });
    let some_gradient = |case: &OptimCase, is: fn(f64) -> bool| {
        let mut given = case.tensors.iter().flat_map(|one| one.grads.iter());
        given.any(|grad| grad.iter().flatten().any(|x| is(x.0)))
    };
    of(20, "with tiny gradients", |case| {
        some_gradient(case, |x| x != 0.0 && x.abs() < 1e-12)
    });
    of(20, "with huge gradients", |case| {
        some_gradient(case, |x| x.is_finite() && x.abs() > 1e12)
    });
    of(20, "with zeros only", |case| {
        !some_gradient(case, |x| x != 0.0)
    });
}

#[test]
fn every_case_is_complete() {
    for case in cases() {
        let steps = case.steps();
        assert!(case.tensors.iter().all(|one| one.grads.len() == steps));
        assert!(case.lrs.as_ref().is_none_or(|lrs| lrs.len() == steps));
        let norms = case.total_norms.as_ref().map_or(0, Vec::len);
        let by_norm = matches!(case.clip, Some(Limit::Norm(_)));
        assert_eq!(norms, if by_norm { steps } else { 0 }, "{}", case.id);
    }
}

/// A number a little further from `x` than is `allowed`.
fn away(x: f64, allowed: f64, dtype: DType) -> f64 {
    // One unit in the last place of a number that is not subnormal.
    let (unit, smallest) = match dtype {
        DType::F64 => (2f64.powi(-52), 0.0),
        DType::F32 => (2f64.powi(-23), 1.5e-45),
        DType::F16 => (2f64.powi(-10), 6e-8),
        _ => (2f64.powi(-7), 9.2e-41),
    };
    x + 2.5 * allowed + 1.01 * unit * x.abs() + smallest
}

/// The comparison can fail: every expected number counts.
#[test]
fn every_expectation_that_is_changed_is_found() {
    let mut changed = 0;
    for case in cases() {
        let outcome = backend::with_backend(kernels(), || case.run(Way::Step)).unwrap();
        let found = |wrong: &OptimCase, what: &str| {
            let differences = wrong.differences(&outcome);
            let faults = differences.iter().filter(|one| one.is_fault()).count();
            assert_eq!(faults, 1, "{}: {what}", case.id);
        };
        for (index, one) in case.tensors.iter().enumerate() {
            for (at, end) in one.end.iter().enumerate() {
                let mut wrong = case.clone();
                let instead = if end.0.is_finite() {
                    away(end.0, case.allowed(index, at), one.dtype)
                } else {
                    0.0
                };
                wrong.tensors[index].end[at] = Number(instead);
                found(&wrong, &format!("element {at} of {index}"));
                wrong.tensors[index].end[at] = Number(if end.0.is_nan() { 0.0 } else { f64::NAN });
                found(&wrong, &format!("NaN as element {at} of {index}"));
                changed += 1;
            }
        }
        for step in 0..case.total_norms.as_ref().map_or(0, Vec::len) {
            let mut wrong = case.clone();
            let norm = &mut wrong.total_norms.as_mut().unwrap()[step];
            *norm = Number(if norm.0.is_finite() {
                norm.0 * 1.00001 + 1e-300
            } else {
                1.0
            });
            found(&wrong, &format!("norm of step {step}"));
            changed += 1;
        }
    }
    assert!(changed >= 3_000, "only {changed} numbers were changed");
}

/// Some way in which an optimizer may be wrong; false if that is no change.
type Mistake = fn(&mut OptimCase) -> bool;

fn adamw(case: &mut OptimCase) -> Option<&mut optimizer_cases::AdamWHyper> {
    match &mut case.optimizer {
        Hyper::AdamW(hyper) => Some(hyper),
        Hyper::Sgd(_) => None,
    }
}

fn momentum(case: &mut OptimCase) -> Option<&mut optimizer_cases::SgdHyper> {
    match &mut case.optimizer {
        Hyper::Sgd(hyper) if hyper.momentum > 0.0 => Some(hyper),
        _ => None,
    }
}

/// Multiplies a hyper-parameter; false if it is missing or zero.
fn scaled(value: Option<&mut f64>, factor: f64) -> bool {
    value.is_some_and(|value| {
        *value *= factor;
        *value != 0.0
    })
}

/// The cases tell a right optimizer from a wrong one: for each mistake, how many of the cases in
/// which it can be made must end elsewhere, in percent. (Not all: where gradients are zero, or
/// moments short-lived, some make no difference.)
#[rustfmt::skip]
const MISTAKES: [(&str, usize, Mistake); 13] = [
    ("learning rate", 75, |case| {
        case.lrs = case.lrs.take().map(|lrs| lrs.iter().map(|lr| lr * 1.01).collect());
        match &mut case.optimizer {
            Hyper::AdamW(hyper) => scaled(Some(&mut hyper.lr), 1.01),
            Hyper::Sgd(hyper) => scaled(Some(&mut hyper.lr), 1.01),
        }
    }),
    ("beta1", 60, |case| scaled(adamw(case).map(|hyper| &mut hyper.beta1), 0.99)),
    ("beta2", 50, |case| scaled(adamw(case).map(|hyper| &mut hyper.beta2), 0.99)),
    ("eps", 60, |case| scaled(adamw(case).map(|hyper| &mut hyper.eps), 100.0)),
    ("AdamW's weight decay", 80, |case| scaled(adamw(case).map(|hyper| &mut hyper.weight_decay), 0.9)),
    ("AMSGrad", 40, |case| adamw(case).is_some_and(|hyper| { hyper.amsgrad ^= true; true })),
    ("momentum", 70, |case| scaled(momentum(case).map(|hyper| &mut hyper.momentum), 0.99)),
    ("dampening", 70, |case| scaled(momentum(case).map(|hyper| &mut hyper.dampening), 0.9)),
    ("Nesterov", 80, |case| momentum(case).is_some_and(|hyper| {
        hyper.nesterov ^= true;
        hyper.dampening == 0.0
    })),
    ("SGD's weight decay", 70, |case| match &mut case.optimizer {
        Hyper::Sgd(hyper) => scaled(Some(&mut hyper.weight_decay), 0.9),
        Hyper::AdamW(_) => false,
    }),
    ("limit", 65, |case| match &mut case.clip {
        Some(Limit::Norm(limit) | Limit::Value(limit)) => scaled(Some(limit), 0.9),
        None => false,
    }),
    ("master weights", 65, |case| {
        case.master_weights ^= true;
        case.has_halves() && case.steps() > 1
    }),
    ("schedule", 90, |case| case.lrs.take().is_some()),
];

#[test]
fn every_mistake_is_found() {
    let cases = cases();
    for (what, percent, mistake) in MISTAKES {
        let (mut made, mut found) = (0, 0);
        for case in cases {
            let mut wrong = case.clone();
            if mistake(&mut wrong) {
                made += 1;
                found += usize::from(!faults(case, &wrong, Way::Step, kernels()).is_empty());
            }
        }
        println!("{what}: found in {found} of {made} cases");
        assert!(made >= 10, "{what}: only {made} cases");
        assert!(
            found * 100 >= made * percent,
            "{what}: found in {found} of {made} cases, expected {percent} %"
        );
    }
}
