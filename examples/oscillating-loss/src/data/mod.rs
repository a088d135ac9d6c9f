//! Daily series, cut into windows of [`CONTEXT`] days and the day after each.

mod csv_file;
mod weather;

use anyhow::Result;
use candle_core::{Device, Tensor};

/// Days that the model sees: the length of a window's input.
pub const CONTEXT: usize = 32;

/// Share of a series' days, from its start, to train on; the rest is for testing.
const TRAIN_SHARE: f64 = 0.75;

/// The windows of one part of the data.
///
/// Window `n`, day `t`: the inputs `x[n, t]` are known on that day, and `y[n, t]` is the first
/// input of the day after.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Inputs, f32 `[windows, CONTEXT, features]`.
    pub x: Tensor,
    /// Targets, f32 `[windows, CONTEXT]`.
    pub y: Tensor,
}

impl Windows {
    /// How many windows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.x.dims()[0]
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Cuts every stretch of `CONTEXT + 1` consecutive days from each series, in order.
    fn cut(series: &[&[Vec<f32>]]) -> Result<Self> {
        let (mut x, mut y, mut count) = (Vec::<f32>::new(), Vec::new(), 0);
        for window in series.iter().flat_map(|days| days.windows(CONTEXT + 1)) {
            x.extend(window[..CONTEXT].iter().flatten());
            y.extend(window[1..].iter().map(|day| day[0]));
            count += 1;
        }
        Ok(Self {
            x: Tensor::from_vec(x, (count, CONTEXT, series[0][0].len()), &Device::Cpu)?,
            y: Tensor::from_vec(y, (count, CONTEXT), &Device::Cpu)?,
        })
    }

    fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            x: self.x.to_device(device)?,
            y: self.y.to_device(device)?,
        })
    }
}

/// Windows to train and to test on: the weather that this program carries, or a user's own series.
#[derive(Debug, Clone)]
pub struct Weather {
    /// What the inputs are, in order; the first is the target.
    pub features: Vec<String>,
    /// The first three quarters of each series.
    pub train: Windows,
    /// The last quarter of each series.
    pub test: Windows,
}

impl Weather {
    /// Splits each series by time and cuts both parts into windows; none crosses the border.
    fn split(features: Vec<String>, series: &[Vec<Vec<f32>>]) -> Result<Self> {
        let parts: Vec<_> = series
            .iter()
            .map(|days| days.split_at(train_days(days.len())))
            .collect();
        let train: Vec<_> = parts.iter().map(|part| part.0).collect();
        let test: Vec<_> = parts.iter().map(|part| part.1).collect();
        Ok(Self {
            features,
            train: Windows::cut(&train)?,
            test: Windows::cut(&test)?,
        })
    }

    /// The same windows on `device`.
    ///
    /// # Errors
    /// If the device can't hold them.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            features: self.features.clone(),
            train: self.train.to_device(device)?,
            test: self.test.to_device(device)?,
        })
    }
}

fn train_days(days: usize) -> usize {
    (days as f64 * TRAIN_SHARE) as usize
}
