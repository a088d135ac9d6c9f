//! Properties that hold for any gradients.

use candle_core::{DType, Result, Tensor, Var};
use candle_grad_clip::backend::{self, Backend};
use candle_grad_clip::{
    Clip, ClipGradNorm, ClippedOptimizer, NormType, clip_by_global_norm, clip_grad_norm,
    clip_grad_norm_with, clip_grad_value, total_norm,
};
use candle_nn::Optimizer;
use proptest::prelude::*;
use support::device::{backends, device, kernels};
use support::gradients::{
    all_values, bits, bits_of_gradients, bits_of_vars, copies, gradients_of, store_for, store_of,
    tensor, values, var_for,
};
use support::optimizers::Recorder;
use support::oracle;

fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(vec![DType::F32, DType::F64, DType::F16, DType::BF16])
}

fn any_norm_type() -> impl Strategy<Value = NormType> {
    prop_oneof![
        Just(NormType::L1),
        Just(NormType::L2),
        Just(NormType::Inf),
        (0.5f64..6.0).prop_map(NormType::P),
    ]
}

/// Finite values that every dtype holds, with exact zeros among them.
fn any_value() -> impl Strategy<Value = f64> {
    prop_oneof![
        8 => -100.0..100.0f64,
        1 => Just(0.0),
        1 => (-4.0..4.0f64).prop_map(|x| 10f64.powf(x)),
    ]
}

/// Some gradients of mixed dtypes, a few of them empty.
fn any_gradients() -> impl Strategy<Value = Vec<Tensor>> {
    let one = (prop::collection::vec(any_value(), 0..40), any_dtype());
    prop::collection::vec(one, 0..6).prop_map(|list| {
        let make = |(values, dtype): (Vec<f64>, DType)| tensor(&values, values.len(), dtype);
        list.into_iter().map(make).collect::<Result<_>>().unwrap()
    })
}

fn any_backend() -> impl Strategy<Value = Backend> {
    prop::sample::select(backends().to_vec())
}

/// Half a unit in the last place of the coarsest dtype.
fn rounding(gradients: &[Tensor]) -> f64 {
    let of = |gradient: &Tensor| oracle::tolerance(gradient.dtype());
    gradients.iter().map(of).fold(1e-6, f64::max)
}

/// How one gradient lies in memory that it may share with others.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// Its own storage.
    Own,
    /// The storage of another gradient.
    Same(usize),
    /// The values of a Var.
    OfVar(usize),
    /// Rows of one large matrix.
    Rows(usize),
    /// Columns of it: not contiguous.
    Columns(usize),
    /// One row repeated: stride 0.
    Broadcast,
}

const N: usize = 6;

fn any_place() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Own),
        (0..8usize).prop_map(Place::Same),
        (0..8usize).prop_map(Place::OfVar),
        (0..N).prop_map(Place::Rows),
        (0..N).prop_map(Place::Columns),
        Just(Place::Broadcast),
    ]
}

/// Vars of (N, N) with values, and a gradient for each at its place.
fn place(places: &[Place]) -> Result<(Vec<Var>, Vec<Tensor>)> {
    let random = |seed| support::gradients::random_values(N * N, seed);
    let vars: Vec<Var> = (0..places.len() as u64)
        .map(|i| Var::from_tensor(&tensor(&random(100 + i), (N, N), DType::F32)?))
        .collect::<Result<_>>()?;
    let large = support::gradients::random_values(4 * N * N, 7);
    let large = tensor(&large, (2 * N, 2 * N), DType::F32)?;
    let mut gradients: Vec<Tensor> = Vec::new();
    for (i, place) in places.iter().enumerate() {
        let own = tensor(&random(i as u64), (N, N), DType::F32)?;
        gradients.push(match *place {
            Place::Own => own,
            Place::Same(other) => gradients.get(other % (i + 1)).cloned().unwrap_or(own),
            Place::OfVar(other) => vars[other % vars.len()].as_tensor().clone(),
            Place::Rows(at) => large.reshape((4 * N, N))?.narrow(0, at, N)?,
            Place::Columns(at) => large.narrow(0, at, N)?.narrow(1, at, N)?,
            Place::Broadcast => own.narrow(0, 0, 1)?.broadcast_as((N, N))?,
        });
    }
    Ok((vars, gradients))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn the_norm_after_is_within_the_bound_and_the_direction_is_kept(
        gradients in any_gradients(),
        norm_type in any_norm_type(),
        max_norm in 1e-3..1e3f64,
        backend in any_backend(),
    ) {
        let (vars, mut store) = store_of(&copies(&gradients).unwrap()).unwrap();
        let options = ClipGradNorm { max_norm, norm_type, ..ClipGradNorm::default() };
        let before = all_values(&gradients).unwrap();
        let norm = backend::with_backend(backend, || clip_grad_norm_with(&mut store, &vars, &options)).unwrap();
        let right = oracle::norm(&before, norm_type.p());
        let floor = if backend == Backend::CandleOps { 1e-5 } else { 1e-12 };
        prop_assert!((norm - right).abs() <= floor * right, "{norm} for {right}");

        let after = all_values(&gradients_of(&store, &vars).unwrap()).unwrap();
        let tolerance = rounding(&gradients);
        let clipped = oracle::norm(&after, norm_type.p());
        // Elements that a half type rounds below its normal range err by more than a ulp of theirs.
        let slack = 1e-6 * after.len() as f64;
        prop_assert!(clipped <= max_norm * (1.0 + tolerance) + slack, "{clipped} > {max_norm}");
        let coef = oracle::clip_coef(right, max_norm, 1e-6);
        for (x, y) in before.iter().zip(&after) {
            let (scaled, error) = (x * coef, (x * coef - y).abs());
            prop_assert!(error <= scaled.abs() * (tolerance + floor) + 1e-7, "{y}, expected {scaled}");
        }
    }

    #[test]
    fn value_clipping_keeps_to_its_bounds_and_once_is_enough(
        gradients in any_gradients(),
        clip_value in 1e-3..200.0f64,
        backend in any_backend(),
    ) {
        let (vars, mut store) = store_of(&copies(&gradients).unwrap()).unwrap();
        backend::with_backend(backend, || clip_grad_value(&mut store, &vars, clip_value)).unwrap();
        let clipped = gradients_of(&store, &vars).unwrap();
        for (before, after) in gradients.iter().zip(&clipped) {
            let bound = values(&tensor(&[clip_value], 1, before.dtype()).unwrap()).unwrap()[0];
            for (x, y) in values(before).unwrap().into_iter().zip(values(after).unwrap()) {
                prop_assert_eq!(y, x.clamp(-bound, bound));
            }
        }
        let once = bits_of_gradients(&store, &vars).unwrap();
        backend::with_backend(backend, || clip_grad_value(&mut store, &vars, clip_value)).unwrap();
        prop_assert_eq!(bits_of_gradients(&store, &vars).unwrap(), once);
    }

    #[test]
    fn the_order_of_the_vars_hardly_matters(
        gradients in any_gradients(),
        norm_type in any_norm_type(),
        seed in any::<u64>(),
    ) {
        let (mut vars, store) = store_of(&gradients).unwrap();
        let norm = total_norm(&store, &vars, norm_type).unwrap();
        fastrand::Rng::with_seed(seed).shuffle(&mut vars);
        let shuffled = total_norm(&store, &vars, norm_type).unwrap();
        prop_assert!((norm - shuffled).abs() <= 1e-12 * norm);
    }

    #[test]
    fn the_norm_is_homogeneous(
        values in prop::collection::vec(any_value(), 0..200),
        norm_type in any_norm_type(),
        exponent in -900..900i32,
    ) {
        let factor = 2f64.powi(exponent);
        let norm = |values: &[f64]| {
            let (vars, store) = store_of(&[tensor(values, values.len(), DType::F64).unwrap()]).unwrap();
            total_norm(&store, &vars, norm_type).unwrap()
        };
        let scaled: Vec<f64> = values.iter().map(|x| x * factor).collect();
        let (ours, right) = (norm(&scaled), norm(&values) * factor);
        prop_assert!((ours - right).abs() <= 1e-12 * right, "{ours:e}, expected {right:e}");
    }

    #[test]
    fn backends_agree(
        gradients in any_gradients(),
        norm_type in any_norm_type(),
        clip in prop_oneof![
            Just(Clip::none()),
            (1e-3..1e3f64).prop_map(Clip::norm),
            (1e-3..200.0f64).prop_map(Clip::value),
        ],
    ) {
        let run = |backend| {
            let vars: Vec<Var> = gradients.iter().map(|g| var_for(g).unwrap()).collect();
            let inner = Recorder::new(vars.clone(), true).unwrap();
            let clip = clip.clone().norm_type(norm_type);
            let mut opt = ClippedOptimizer::wrap(inner, vars.clone(), clip).unwrap();
            let store = store_for(&vars, &gradients);
            let report = backend::with_backend(backend, || opt.step_report(&store)).unwrap();
            let given: Vec<Tensor> = opt.inner().steps[0].iter().flatten().cloned().collect();
            (all_values(&given).unwrap(), report.record().unwrap().clone())
        };
        let (cpu, cpu_record) = run(kernels());
        let (composed, composed_record) = run(Backend::CandleOps);
        let tolerance = rounding(&gradients).max(1e-5);
        let floor = gradients.iter().map(|g| oracle::floor(g.dtype())).fold(0.0, f64::max);
        for (x, y) in cpu.iter().zip(&composed) {
            prop_assert!((x - y).abs() <= tolerance * x.abs() + floor, "{x} and {y}");
        }
        let near = |x: f64, y: f64| (x - y).abs() <= 1e-5 * x.abs();
        prop_assert!(near(cpu_record.total_norm, composed_record.total_norm));
        prop_assert!(near(cpu_record.clipped_norm, composed_record.clipped_norm));
        prop_assert!(near(cpu_record.clip_coef, composed_record.clip_coef));
        prop_assert_eq!(cpu_record.num_clipped, composed_record.num_clipped);
    }

    #[test]
    fn clip_by_global_norm_leaves_its_input_alone(
        places in prop::collection::vec(any_place(), 1..7),
        clip_norm in 1e-3..100.0f64,
        backend in any_backend(),
    ) {
        let (vars, gradients) = place(&places).unwrap();
        let store = store_for(&vars, &gradients);
        let (before, weights) = (bits_of_gradients(&store, &vars).unwrap(), bits_of_vars(&vars).unwrap());
        let (clipped, _) =
            backend::with_backend(backend, || clip_by_global_norm(&store, &vars, clip_norm, None)).unwrap();
        let norm = total_norm(&clipped, &vars, NormType::L2).unwrap();
        prop_assert!(norm <= clip_norm * (1.0 + 1e-6));
        prop_assert_eq!(bits_of_gradients(&store, &vars).unwrap(), before);
        prop_assert_eq!(bits_of_vars(&vars).unwrap(), weights);
    }

    #[test]
    fn shared_storage_never_changes_a_weight_or_scales_twice(
        places in prop::collection::vec(any_place(), 1..7),
        backend in any_backend(),
    ) {
        let (vars, gradients) = place(&places).unwrap();
        let weights: Vec<Vec<u64>> = vars.iter().map(|var| bits(var).unwrap()).collect();
        let before = all_values(&gradients).unwrap();
        let mut store = store_for(&vars, &gradients);
        let norm = backend::with_backend(backend, || clip_grad_norm(&mut store, &vars, 1.0)).unwrap();
        let coef = oracle::clip_coef(norm, 1.0, 1e-6);
        let after = all_values(&gradients_of(&store, &vars).unwrap()).unwrap();
        for (x, y) in before.iter().zip(&after) {
            let right = x * coef;
            prop_assert!((right - y).abs() <= 1e-6 * right.abs(), "{y}, expected {right}");
        }
        backend::with_backend(backend, || clip_grad_value(&mut store, &vars, 1e-3)).unwrap();
        let clamped = all_values(&gradients_of(&store, &vars).unwrap()).unwrap();
        prop_assert!(clamped.iter().all(|x| x.abs() <= 1.0001e-3));
        prop_assert_eq!(bits_of_vars(&vars).unwrap(), weights);
    }
}

#[test]
fn places_really_share() -> Result<()> {
    // The property above is worth something only if its places alias.
    let (vars, gradients) = place(&[Place::Own, Place::Same(0), Place::OfVar(0)])?;
    assert_eq!(bits(&gradients[0])?, bits(&gradients[1])?);
    assert_eq!(bits(&gradients[2])?, bits(&vars[0])?);
    vars[0].set(&Tensor::zeros((N, N), DType::F32, device())?)?;
    assert!(
        values(&gradients[2])?.iter().all(|x| *x == 0.0),
        "the same storage"
    );
    Ok(())
}
