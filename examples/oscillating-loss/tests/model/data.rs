//! A user's CSV: what is read, and what is said about what can't be.

use std::fmt::Write;

use candle_core::IndexOp;
use oscillating_loss::data::{CONTEXT, Weather};

/// `rows` days: a label, a day number, and a temperature that rises by 0.5 a day.
fn csv(rows: usize) -> String {
    let mut text = String::from("label,day,temp\n");
    for day in 0..rows {
        writeln!(text, "\"a, b\",{day},{}", 0.5 * day as f64).unwrap();
    }
    text
}

fn read(text: &str, target: &str) -> anyhow::Result<Weather> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("series.csv");
    std::fs::write(&path, text)?;
    Weather::from_csv(&path, target)
}

fn error(text: &str, target: &str) -> String {
    format!("{:#}", read(text, target).unwrap_err())
}

#[test]
fn the_target_comes_first_and_text_columns_are_left_out() {
    let weather = read(&csv(200), "temp").unwrap();
    assert_eq!(weather.features, ["temp", "day"]);
    assert_eq!(weather.train.x.dims(), [150 - CONTEXT, CONTEXT, 2]);
    assert_eq!(weather.test.x.dims(), [50 - CONTEXT, CONTEXT, 2]);
}

#[test]
fn columns_are_standardised_over_the_rows_to_train_on() {
    let weather = read(&csv(200), "temp").unwrap();
    // Days 0..150: mean 74.5, variance (150^2 - 1) / 12; the first target is day 1.
    let expected = (1.0 - 74.5) / ((150f64.powi(2) - 1.0) / 12.0).sqrt();
    let first = f64::from(
        weather
            .train
            .y
            .i((0, 0))
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
    );
    assert!(
        (first - expected).abs() < 1e-6,
        "{first}, expected {expected}"
    );
}

#[test]
fn the_target_is_the_first_input_of_the_next_day() {
    let test = Weather::embedded().unwrap().test;
    let next: Vec<f32> = test.x.i((1.., CONTEXT - 1, 0)).unwrap().to_vec1().unwrap();
    let y: Vec<f32> = test.y.i((.., CONTEXT - 1)).unwrap().to_vec1().unwrap();
    // Windows follow each other by a day, except from one city to the other.
    let cities = test.len() / 2;
    assert_eq!(y[..cities - 1], next[..cities - 1]);
    assert_eq!(y[cities..test.len() - 1], next[cities..]);
}

#[test]
fn the_embedded_weather_has_its_windows() {
    let weather = Weather::embedded().unwrap();
    assert_eq!(weather.train.x.dims(), [2126, CONTEXT, 7]);
    assert_eq!(weather.test.x.dims(), [668, CONTEXT, 7]);
    // Seattle, 1 January 2012: 12.8 and 5.0 degrees, no rain, 4.7 m/s.
    let day: Vec<f32> = weather.train.x.i((0, 0)).unwrap().to_vec1().unwrap();
    let season = std::f64::consts::TAU / 365.25;
    let expected = [-0.22, -0.3, 0.0, 0.94, season.sin(), season.cos(), 0.0];
    for (value, expected) in day.iter().zip(expected) {
        assert!((f64::from(*value) - expected).abs() < 1e-6, "{day:?}");
    }
}

#[test]
fn a_missing_column_is_named_with_those_there_are() {
    let text = error(&csv(200), "rain");
    assert!(
        text.contains("no column `rain`; the columns are: label, day, temp"),
        "{text}"
    );
}

#[test]
fn a_bad_number_is_named_by_line_and_column() {
    for bad in ["warm", "", "NaN", "inf"] {
        let text = csv(200).replace(",40,20\n", &format!(",40,{bad}\n"));
        let text = error(&text, "day");
        let expected = format!("line 42, column `temp`: expected a number, found `{bad}`");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn a_target_of_text_is_an_error() {
    let text = error(&csv(200), "label");
    assert!(
        text.contains("line 2, column `label`: expected a number, found `a, b`"),
        "{text}"
    );
}

#[test]
fn a_short_line_is_an_error_with_its_line() {
    let text = error(&csv(200).replace(",40,20\n", ",40\n"), "day");
    assert!(text.contains("line: 42"), "{text}");
}

#[test]
fn too_few_rows_say_how_many_are_needed() {
    let text = error(&csv(131), "temp");
    assert!(
        text.contains("131 rows, but at least 132 are needed"),
        "{text}"
    );
    let weather = read(&csv(132), "temp").unwrap();
    assert_eq!(weather.test.len(), 1);
    for text in ["label,day,temp\n", ""] {
        assert!(read(text, "temp").is_err());
    }
}

#[test]
fn a_constant_column_becomes_zeros() {
    let text = csv(200)
        .replace("day,temp\n", "day,temp,flat\n")
        .replace('\n', ",7\n");
    let text = text.replacen("flat,7", "flat", 1);
    let weather = read(&text, "temp").unwrap();
    assert_eq!(weather.features, ["temp", "day", "flat"]);
    let flat: Vec<f32> = weather.train.x.i((0, .., 2)).unwrap().to_vec1().unwrap();
    assert!(flat.iter().all(|value| *value == 0.0), "{flat:?}");
}

#[test]
fn a_missing_file_is_named() {
    let path = std::path::Path::new("no/such/file.csv");
    let text = format!("{:#}", Weather::from_csv(path, "temp").unwrap_err());
    assert!(text.contains("can't read `no/such/file.csv`"), "{text}");
}
