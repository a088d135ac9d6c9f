//! candle's operations on the stand-in device: the same values as on CPU.

use anyhow::Result;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW};
use support::cuda_on_host::Driver;
use support::gradients::{FLOATS, random_values, values};
use support::oracle::tolerance;

use crate::assert_close;

fn random(shape: (usize, usize), seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    let values = random_values(shape.0 * shape.1, seed);
    Ok(Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)
}

/// Each operation's name and result.
fn operations(dtype: DType, device: &Device) -> Result<Vec<(&'static str, Tensor)>> {
    let (a, b) = (
        random((9, 70), 1, dtype, device)?,
        random((9, 70), 2, dtype, device)?,
    );
    let row = b.narrow(0, 3, 1)?;
    let positive = (a.abs()? + 0.5)?;
    let mut all = vec![
        ("zeros", a.zeros_like()?),
        ("ones", a.ones_like()?),
        (
            "full",
            Tensor::full(0.75f32, (3, 5), device)?.to_dtype(dtype)?,
        ),
        ("copy", a.copy()?),
        ("transposed", a.t()?.contiguous()?),
        ("narrow", a.narrow(1, 5, 40)?.contiguous()?),
        ("add", (&a + &b)?),
        ("sub", (&a - &b)?),
        ("mul", (&a * &b)?),
        ("div", (&a / &positive)?),
        ("add strided", (a.t()? + b.t()?)?),
        ("broadcast mul", a.broadcast_mul(&row)?),
        ("affine", a.affine(1.5, -0.25)?),
        ("neg", a.neg()?),
        ("abs", a.abs()?),
        ("sqr", a.sqr()?),
        ("sqrt", positive.sqrt()?),
        ("recip", positive.recip()?),
        ("exp", a.exp()?),
        ("powf", positive.powf(1.5)?),
        ("tanh", a.tanh()?),
        ("relu", a.relu()?),
        ("gelu", a.gelu()?),
        ("maximum", a.maximum(&b)?),
        ("minimum", a.minimum(0.25)?),
        ("clamp", a.clamp(-0.5, 0.5)?),
        ("eq", a.eq(&a.relu()?)?),
        ("lt", a.lt(&b)?),
        ("where", a.lt(&b)?.where_cond(&a, &b)?),
    ];
    all.extend(sums_and_shapes(&a, &b, &positive)?);
    Ok(all)
}

/// Those of more than one element of their arguments, and conversions.
fn sums_and_shapes(
    a: &Tensor,
    b: &Tensor,
    positive: &Tensor,
) -> Result<Vec<(&'static str, Tensor)>> {
    let row = b.narrow(0, 3, 1)?;
    let ids = Tensor::new(&[4u32, 0, 8], a.device())?;
    Ok(vec![
        ("sum", positive.sum(D::Minus1)?),
        ("sum of strided", positive.sum(0)?),
        // Few enough that the CPU, which adds in bf16, does not lose them.
        ("sum_all", positive.narrow(1, 0, 4)?.sum_all()?),
        (
            "of a scalar",
            a.max_all()?.affine(2.0, 1.0)?.abs()?.broadcast_add(&row)?,
        ),
        ("mean", positive.mean(1)?),
        ("max", a.max(D::Minus1)?),
        ("min", a.min(0)?),
        ("argmax", a.argmax(D::Minus1)?),
        ("cat", Tensor::cat(&[a, b], 0)?),
        ("cat of columns", Tensor::cat(&[a, b], 1)?),
        ("stack", Tensor::stack(&[a, b], 1)?),
        ("index_select", a.index_select(&ids, 0)?),
        ("index_add", a.index_add(&ids, &b.narrow(0, 0, 3)?, 0)?),
        ("matmul", a.matmul(&b.t()?)?),
        ("softmax", candle_nn::ops::softmax(a, D::Minus1)?),
        ("f32", a.to_dtype(DType::F32)?),
        ("f64", a.to_dtype(DType::F64)?),
        ("f16", a.to_dtype(DType::F16)?),
        ("bf16", a.to_dtype(DType::BF16)?),
        ("u8", positive.to_dtype(DType::U8)?),
        ("u32", positive.to_dtype(DType::U32)?),
    ])
}

#[test]
fn operations_are_those_of_the_cpu() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    for dtype in FLOATS {
        let (on_gpu, on_cpu) = (operations(dtype, &gpu)?, operations(dtype, &Device::Cpu)?);
        for ((name, got), (_, want)) in on_gpu.iter().zip(&on_cpu) {
            assert_eq!(got.dtype(), want.dtype());
            assert_eq!(got.dims(), want.dims());
            // In half precision, many elements are the largest.
            if *name == "argmax" && dtype.size_in_bytes() == 2 {
                continue;
            }
            // Sums in half precision are rounded once there, at each step here.
            let rounds = if name.starts_with("sum") || *name == "mean" {
                30.0
            } else {
                8.0
            };
            assert_close(
                got,
                want,
                rounds * tolerance(dtype),
                &format!("{name} of {dtype:?}"),
            )?;
        }
    }
    Ok(())
}

/// Two layers, mean squared error, some steps of candle's AdamW: the Vars.
fn train(dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let var = |shape, seed| -> Result<Var> {
        Ok(Var::from_tensor(&random(shape, seed, dtype, device)?)?)
    };
    let vars = vec![
        var((16, 12), 1)?,
        var((1, 16), 2)?,
        var((3, 16), 3)?,
        var((1, 3), 4)?,
    ];
    let layer = |w: usize| -> Result<Linear> {
        let bias = vars[w + 1].flatten_all()?;
        Ok(Linear::new(vars[w].as_tensor().clone(), Some(bias)))
    };
    let (x, y) = (
        random((20, 12), 5, dtype, device)?,
        random((20, 3), 6, dtype, device)?,
    );
    let mut adamw = AdamW::new(
        vars.clone(),
        ParamsAdamW {
            lr: 0.01,
            ..ParamsAdamW::default()
        },
    )?;
    for _ in 0..4 {
        let hidden = layer(0)?.forward(&x)?.gelu()?;
        let loss = (layer(2)?.forward(&hidden)? - &y)?.sqr()?.mean_all()?;
        adamw.backward_step(&loss)?;
    }
    Ok(vars.iter().map(|var| var.as_tensor().clone()).collect())
}

#[test]
fn training_is_that_of_the_cpu() -> Result<()> {
    let _driver = Driver::lock();
    let gpu = Device::new_cuda(0)?;
    for dtype in [DType::F32, DType::F64] {
        let (on_gpu, on_cpu) = (train(dtype, &gpu)?, train(dtype, &Device::Cpu)?);
        for (i, (got, want)) in on_gpu.iter().zip(&on_cpu).enumerate() {
            assert!(values(got)?.iter().all(|x| x.is_finite()));
            // AdamW divides by gradients: f32's rounding counts for more where they are small.
            assert_close(
                got,
                want,
                100.0 * tolerance(dtype),
                &format!("Var {i} of {dtype:?}"),
            )?;
        }
    }
    Ok(())
}
