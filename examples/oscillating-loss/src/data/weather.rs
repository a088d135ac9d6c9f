//! The embedded weather of Seattle and New York, and its seven inputs.

use std::f64::consts::TAU;

use anyhow::{Context, Result};
use jiff::civil::Date;
use serde::Deserialize;

use super::Weather;

const CSV: &str = include_str!("../../data/weather.csv");

/// The columns that are read; see `data/README.md` for source and units.
#[derive(Deserialize)]
struct Day {
    location: String,
    date: String,
    precipitation: f64,
    temp_max: f64,
    temp_min: f64,
    wind: f64,
}

impl Day {
    /// Inputs of roughly unit size; the first is the one to forecast.
    fn inputs(&self, city: usize) -> Result<Vec<f32>> {
        let date: Date = self.date.parse().context("the embedded weather")?;
        let season = TAU * f64::from(date.day_of_year()) / 365.25;
        let inputs = [
            (self.temp_max - 15.0) / 10.0,
            (self.temp_min - 8.0) / 10.0,
            self.precipitation / 10.0,
            self.wind / 5.0,
            season.sin(),
            season.cos(),
            city as f64,
        ];
        Ok(inputs.map(|value| value as f32).to_vec())
    }
}

impl Weather {
    /// Four years of daily weather in two cities, in the file's order: 2,126 windows to train on,
    /// 668 to test on.
    ///
    /// Inputs: maximum and minimum temperature as (°C - 15) / 10 and (°C - 8) / 10, rain in cm,
    /// wind in 5 m/s, sine and cosine of the day of the year, the city (0 or 1).
    ///
    /// # Errors
    /// Only if the embedded file were broken.
    pub fn embedded() -> Result<Self> {
        let mut cities: Vec<String> = Vec::new();
        let mut series: Vec<Vec<Vec<f32>>> = Vec::new();
        for day in csv::Reader::from_reader(CSV.as_bytes()).deserialize() {
            let day: Day = day.context("the embedded weather")?;
            if cities.last() != Some(&day.location) {
                cities.push(day.location.clone());
                series.push(Vec::new());
            }
            let city = cities.len() - 1;
            series[city].push(day.inputs(city)?);
        }
        let features = [
            "temp_max",
            "temp_min",
            "precipitation",
            "wind",
            "season_sin",
            "season_cos",
            "city",
        ];
        Self::split(features.map(String::from).to_vec(), &series)
    }
}
