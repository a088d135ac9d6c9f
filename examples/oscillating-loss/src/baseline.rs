//! What a forecast costs that needs no model.

use anyhow::Result;
use candle_core::{DType, IndexOp, Tensor};
use serde::Serialize;

use crate::data::Windows;

/// Losses to beat, on the windows to test on, with the same power and weights as the model's.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Baselines {
    /// The best constant in hindsight: no constant does better on these very windows.
    pub constant: f64,
    /// Tomorrow is as today.
    pub persistence: f64,
}

impl Baselines {
    /// Both losses for mean((1 + alpha |y|) |e|^power), in f64.
    ///
    /// # Errors
    /// If the tensors are not what [`Windows`] says.
    pub fn new(windows: &Windows, power: f64, alpha: f64) -> Result<Self> {
        let list = |t: &Tensor| t.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let (y, today) = (list(&windows.y)?, list(&windows.x.i((.., .., 0))?)?);
        let loss = |forecast: &dyn Fn(usize) -> f64| {
            let cost = |(n, y): (usize, &f64)| {
                (1.0 + alpha * y.abs()) * (forecast(n) - y).abs().powf(power)
            };
            y.iter().enumerate().map(cost).sum::<f64>() / y.len() as f64
        };
        let low = y.iter().copied().fold(f64::INFINITY, f64::min);
        let high = y.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let constant = lowest(|constant| loss(&|_| constant), low, high);
        Ok(Self {
            constant,
            persistence: loss(&|n| today[n]),
        })
    }
}

/// The lowest value of a convex function between two points, by thirds.
fn lowest(f: impl Fn(f64) -> f64, mut low: f64, mut high: f64) -> f64 {
    while high - low > 1e-6 {
        let (left, right) = (low + (high - low) / 3.0, high - (high - low) / 3.0);
        if f(left) < f(right) {
            high = right;
        } else {
            low = left;
        }
    }
    f(f64::midpoint(low, high))
}
