//! Where a run's numbers come from: which data, on which device.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::data::Weather;
use crate::settings::DeviceKind;

/// The data and the device of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Where to train.
    pub device: DeviceKind,
    /// A CSV file in the place of the weather, as an absolute path.
    pub data: Option<PathBuf>,
    /// Its column to forecast.
    pub target: Option<String>,
    /// The checksum of its bytes.
    pub data_crc32c: Option<u32>,
}

impl Source {
    /// The weather, or a CSV file and the column to forecast.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn new(device: DeviceKind, data: Option<(&Path, &str)>) -> Result<Self> {
        let Some((path, target)) = data else {
            return Ok(Self {
                device,
                data: None,
                target: None,
                data_crc32c: None,
            });
        };
        Ok(Self {
            device,
            data: Some(std::path::absolute(path)?),
            target: Some(target.to_owned()),
            data_crc32c: Some(checksum(path)?),
        })
    }

    /// Whether the file is still the one that it was.
    ///
    /// # Errors
    /// If it is not, or can't be read.
    pub fn check_unchanged(&self) -> Result<()> {
        if let (Some(path), Some(crc32c)) = (&self.data, self.data_crc32c) {
            ensure!(
                checksum(path)? == crc32c,
                "`{}` has changed since this run began: expected the same data",
                path.display()
            );
        }
        Ok(())
    }

    /// The windows, on the device.
    ///
    /// # Errors
    /// If there is no such device, or the file is not what [`Weather::from_csv`] says.
    pub fn open(&self) -> Result<Weather> {
        let device = self.device.open()?;
        let weather = match (&self.data, &self.target) {
            (Some(data), Some(target)) => Weather::from_csv(data, target)?,
            _ => Weather::embedded()?,
        };
        weather.to_device(&device)
    }
}

fn checksum(path: &Path) -> Result<u32> {
    let bytes = fs::read(path).with_context(|| format!("can't read `{}`", path.display()))?;
    Ok(crc32c::crc32c(&bytes))
}
