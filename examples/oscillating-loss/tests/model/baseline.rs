//! Losses that need no model.

use anyhow::Result;
use oscillating_loss::baseline::Baselines;
use oscillating_loss::data::Weather;

/// The values that `PyTorch` gave, by its author to three digits and the constant from a grid
/// of 0.05, so ours may be a little lower.
#[test]
fn baselines_agree_with_pytorch() -> Result<()> {
    let test = Weather::embedded()?.test;
    for (power, constant, persistence) in [(3.0, 6.53, 0.272), (4.0, 10.24, 0.194)] {
        let baselines = Baselines::new(&test, power, 4.0)?;
        assert!(
            (baselines.constant / constant - 1.0).abs() < 2e-3,
            "{baselines:?}"
        );
        assert!(
            (baselines.persistence - persistence).abs() < 5e-4,
            "{baselines:?}"
        );
    }
    Ok(())
}
