//! What PyTorch, TensorFlow and optax return, on every backend: see `tests/cases/README.md`.

use candle_core::DType;
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::{ClipGradNorm, Error, NonFinite, clip_grad_norm_with};
use support::cases::{CaseFile, Number, assert_none, at_least};
use support::device::{backends, kernels};
use support::function_cases::{self as cases, Case, CaseTensor, Op, Policy};
use support::gradients::bits_of_gradients;

fn policy(case: &Case) -> NonFinite {
    match case.policy {
        Policy::Error => NonFinite::Error,
        Policy::Propagate => NonFinite::Propagate,
    }
}

/// Every case with its file.
fn each(files: &[CaseFile<Case>]) -> impl Iterator<Item = (&CaseFile<Case>, &Case)> {
    files
        .iter()
        .flat_map(|file| file.cases.iter().map(move |case| (file, case)))
}

/// Runs all cases, and lists those whose outcome is not the expected one.
fn every_case_agrees_on(backend: Backend) {
    let files = cases::all().unwrap();
    let (mut count, mut failures) = (0, Vec::new());
    for (file, case) in each(&files) {
        let outcome = backend::with_backend(backend, || case.run(file.eps.unwrap(), policy(case)));
        let faults = match outcome {
            Ok(outcome) => case.faults(&outcome, backend),
            Err(error) => vec![error.to_string()],
        };
        if !faults.is_empty() {
            failures.push(format!("{}: {}", case.id, faults.join("; ")));
        }
        count += 1;
    }
    assert!(count >= 500, "only {count} cases were run");
    assert_none(&failures, count, &format!("cases fail on {backend:?}"));
}

#[test]
fn every_case_agrees_on_cpu() {
    every_case_agrees_on(kernels());
}

#[test]
fn every_case_agrees_on_candle_ops() {
    every_case_agrees_on(Backend::CandleOps);
}

#[test]
fn the_cases_are_many_and_of_every_kind() {
    let files = cases::all().unwrap();
    let versions: Vec<String> = files
        .iter()
        .map(|file| format!("{} {}", file.framework, file.version))
        .collect();
    assert_eq!(
        versions,
        ["pytorch 2.15.0", "tensorflow 2.21.0", "optax 0.2.8"]
    );
    assert!(each(&files).count() >= 500);
    let at_least = |least, what: &str, is: &dyn Fn(&Case) -> bool| {
        at_least(least, what, each(&files).map(|(_, case)| case), is);
    };
    let ops = [
        Op::TotalNorm,
        Op::ClipGradNorm,
        Op::ClipGradValue,
        Op::ClipGradsWithNorm,
        Op::ClipByGlobalNorm,
    ];
    for op in ops {
        at_least(20, &format!("of {op:?}"), &|case| case.op == op);
    }
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        at_least(200, &format!("with {dtype:?}"), &|case| {
            case.tensors.iter().any(|one| one.dtype == dtype)
        });
    }
    for p in [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, f64::INFINITY] {
        at_least(50, &format!("of norm {p}"), &|case| {
            case.norm_type == Some(Number(p))
        });
    }
    for limit in [0.0, f64::INFINITY] {
        at_least(100, &format!("with limit {limit}"), &|case| {
            case.limit == Some(Number(limit))
        });
    }
    at_least(100, "with a missing gradient", &|case| {
        case.tensors.iter().any(|one| one.grad.is_none())
    });
    at_least(100, "with a gradient of zero elements", &|case| {
        let is_empty = |one: &CaseTensor| one.grad.as_ref().is_some_and(Vec::is_empty);
        case.tensors.iter().any(is_empty)
    });
    at_least(100, "that are not finite", &|case| {
        case.policy == Policy::Propagate
    });
    at_least(100, "that differ", &|case| case.differs.is_some());
}

/// A difference that went away (by a change of ours, or a regenerated file) must be looked at.
#[test]
fn where_a_case_differs_the_framework_is_beyond_the_tolerance() {
    let files = cases::all().unwrap();
    let mut failures = Vec::new();
    for (file, case) in each(&files) {
        let outcome =
            backend::with_backend(kernels(), || case.run(file.eps.unwrap(), policy(case))).unwrap();
        if case.differs.is_some() == case.framework_agrees(&outcome) {
            failures.push(format!("{}: {:?}", case.id, case.differs));
        }
    }
    assert_none(&failures, each(&files).count(), "cases");
}

#[test]
fn gradients_that_are_not_finite_are_an_error_by_default_and_stay_as_they_were() {
    let files = cases::all().unwrap();
    let mut count = 0;
    for (file, case) in each(&files) {
        if case.op != Op::ClipGradNorm || case.policy != Policy::Propagate {
            continue;
        }
        for backend in backends() {
            let (vars, mut grads) = case.store().unwrap();
            let before = bits_of_gradients(&grads, &vars).unwrap();
            let options = ClipGradNorm {
                max_norm: case.limit.unwrap().0,
                norm_type: case.norm_type.unwrap().0.into(),
                eps: file.eps.unwrap(),
                ..ClipGradNorm::default()
            };
            let result =
                backend::with_backend(backend, || clip_grad_norm_with(&mut grads, &vars, &options));
            let bad = |one: &CaseTensor| {
                let grad = one.grad.as_ref();
                grad.is_some_and(|grad| grad.iter().any(|x| !x.0.is_finite()))
            };
            let first_bad = case.tensors.iter().position(bad).unwrap();
            match result {
                Err(Error::NonFinite { var, .. }) => {
                    assert_eq!(var, format!("var.{first_bad}"), "{}", case.id);
                }
                other => panic!("{} on {backend:?}: {other:?}", case.id),
            }
            assert_eq!(
                bits_of_gradients(&grads, &vars).unwrap(),
                before,
                "{}",
                case.id
            );
            count += 1;
        }
    }
    assert!(count >= 190, "only {count} runs");
}
