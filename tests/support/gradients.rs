//! Vars, gradients and stores to test with, and ways to read them back exactly.
//!
//! Every function fails only where candle does.
#![allow(clippy::missing_errors_doc)]

use crate::device::device;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, Var};
use half::{bf16, f16};

/// The dtypes that gradients may have.
pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// A tensor of any float dtype from f64 values.
pub fn tensor(values: &[f64], shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    host_tensor(values, shape, dtype)?.to_device(device())
}

/// The same on CPU, wherever the tests run. (candle can't convert a tensor without elements on a
/// GPU.)
pub fn host_tensor(values: &[f64], shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, shape.into(), &Device::Cpu)?.to_dtype(dtype)
}

/// A Var of zeros, shaped and typed as `gradient` is, where it is.
pub fn var_for(gradient: &Tensor) -> Result<Var> {
    Var::zeros(gradient.shape(), gradient.dtype(), gradient.device())
}

/// Random tensors of these shapes, from seeds that follow one another, of dtypes in turn.
pub fn tensors_of(shapes: &[&[usize]], first_seed: u64, dtypes: &[DType]) -> Result<Vec<Tensor>> {
    let make = |(i, shape): (usize, &&[usize])| {
        let values = random_values(shape.iter().product(), first_seed + i as u64);
        tensor(&values, *shape, dtypes[i % dtypes.len()])
    };
    shapes.iter().enumerate().map(make).collect()
}

/// Vars that start at copies of these values.
pub fn vars_of(starts: &[Tensor]) -> Result<Vec<Var>> {
    starts.iter().map(Var::from_tensor).collect()
}

/// The Vars without their names.
#[must_use]
pub fn without_names(named: &[(String, Var)]) -> Vec<Var> {
    named.iter().map(|(_, var)| var.clone()).collect()
}

/// Vars named by their place: `layer.0` and so on.
#[must_use]
pub fn named_by_place(vars: &[Var]) -> Vec<(String, Var)> {
    let name = |(i, var): (usize, &Var)| (format!("layer.{i}"), var.clone());
    vars.iter().enumerate().map(name).collect()
}

/// Copies with storage of their own.
pub fn copies(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    tensors.iter().map(Tensor::copy).collect()
}

/// Vars of zeros and a store that holds `gradients` as theirs.
pub fn store_of(gradients: &[Tensor]) -> Result<(Vec<Var>, GradStore)> {
    let vars: Vec<Var> = gradients.iter().map(var_for).collect::<Result<_>>()?;
    Ok((vars.clone(), store_for(&vars, gradients)))
}

/// A store without gradients, in every version of candle (0.11 has `GradStore::default`).
pub fn empty_store() -> Result<GradStore> {
    let scalar = Tensor::new(0f32, &Device::Cpu)?;
    let mut store = scalar.backward()?;
    store.remove(&scalar);
    Ok(store)
}

/// A store that holds `gradients` as those of `vars`.
///
/// # Panics
/// If candle fails to make an empty store.
#[must_use]
pub fn store_for(vars: &[Var], gradients: &[Tensor]) -> GradStore {
    let mut store = empty_store().expect("a scalar has a gradient");
    for (var, gradient) in vars.iter().zip(gradients) {
        store.insert(var, gradient.clone());
    }
    store
}

/// A scalar whose gradient with respect to each Var is the tensor beside it, to the bit.
pub fn loss_with_gradients(vars: &[Var], gradients: &[Tensor]) -> Result<Tensor> {
    let device = gradients.first().map_or(device(), Tensor::device);
    let mut loss = Tensor::new(0f64, device)?;
    // candle has no operations on tensors without elements on a GPU.
    let can = |gradient: &Tensor| gradient.elem_count() > 0 || gradient.device().is_cpu();
    for (var, gradient) in vars
        .iter()
        .zip(gradients)
        .filter(|(_, gradient)| can(gradient))
    {
        let product = var.to_dtype(DType::F64)? * gradient.to_dtype(DType::F64)?;
        loss = (loss + product?.sum_all()?)?;
    }
    Ok(loss)
}

/// The elements, widened to f64 (exact).
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor
        .detach()
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// The elements of all `tensors` as one vector.
pub fn all_values(tensors: &[Tensor]) -> Result<Vec<f64>> {
    let lists: Vec<Vec<f64>> = tensors.iter().map(values).collect::<Result<_>>()?;
    Ok(lists.concat())
}

/// The elements of all `vars` as one vector.
pub fn all_values_of_vars(vars: &[Var]) -> Result<Vec<f64>> {
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.detach()).collect();
    all_values(&tensors)
}

/// The bits of the elements, so that NaN equals itself and -0.0 differs from 0.0.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = tensor.detach().to_device(&Device::Cpu)?.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F32 => each(&flat.to_vec1::<f32>()?, |x| x.to_bits().into()),
        DType::F16 => each(&flat.to_vec1::<f16>()?, |x| x.to_bits().into()),
        DType::BF16 => each(&flat.to_vec1::<bf16>()?, |x| x.to_bits().into()),
        DType::F8E4M3 => bits_of_f8(&flat),
        _ => each(&flat.to_dtype(DType::F64)?.to_vec1::<f64>()?, |x| {
            x.to_bits()
        }),
    })
}

/// From the storage: widening F8E4M3 hangs in candle 0.11.1 at some levels of optimisation.
fn bits_of_f8(tensor: &Tensor) -> Vec<u64> {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F8E4M3(values)) => each(values, |x| x.to_bits().into()),
        _ => Vec::new(),
    }
}

fn each<T: Copy>(values: &[T], bits: impl Fn(T) -> u64) -> Vec<u64> {
    values.iter().map(|x| bits(*x)).collect()
}

/// The bits of all Vars' values.
pub fn bits_of_vars(vars: &[Var]) -> Result<Vec<Vec<u64>>> {
    vars.iter().map(|var| bits(var)).collect()
}

/// The bits of the Vars' gradients, `None` where there is none.
pub fn bits_of_gradients(store: &GradStore, vars: &[Var]) -> Result<Vec<Option<Vec<u64>>>> {
    vars.iter()
        .map(|var| store.get(var).map(bits).transpose())
        .collect()
}

/// The gradients of `vars`, all of which have one.
pub fn gradients_of(store: &GradStore, vars: &[Var]) -> Result<Vec<Tensor>> {
    let of = |var: &Var| {
        store
            .get(var)
            .cloned()
            .ok_or_else(|| candle_core::Error::msg("a Var without a gradient"))
    };
    vars.iter().map(of).collect()
}

/// `n` values of both signs, none of them near zero, the same for the same seed.
#[must_use]
pub fn random_values(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut value = || {
        let magnitude = 0.25 + rng.f64();
        if rng.bool() { magnitude } else { -magnitude }
    };
    (0..n).map(|_| value()).collect()
}

/// `n` values over 16 orders of magnitude: the order in which they are added shows in the sum.
#[must_use]
pub fn wide_values(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut value = || (rng.f64() - 0.5) * 10f64.powf(16.0 * rng.f64() - 8.0);
    (0..n).map(|_| value()).collect()
}
