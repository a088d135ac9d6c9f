//! The tables of a study.

use oscillating_loss::commands::study::markdown;
use oscillating_loss::outcome::Outcome;
use oscillating_loss::settings::OptimizerKind;
use oscillating_loss::settings::Settings;

fn outcome(arm: &str, lr: f64, seed: u64, loss: Option<f64>) -> Outcome {
    Outcome {
        settings: Settings {
            arm: arm.parse().unwrap(),
            lr,
            seed,
            ..Settings::default()
        },
        diverged: loss.is_none().then(|| "step 3: the loss is NaN".into()),
        final_test_loss: loss,
        best_test_loss: loss,
        roughness: loss,
        max_total_norm: 1.0,
        clipped_fraction: 0.5,
        num_skipped: 0,
        ms_per_step: 0.0,
    }
}

/// The cells of a row, without the spaces that align them.
fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

#[test]
fn the_best_rate_is_one_with_all_seeds_and_its_noise_is_shown() {
    let outcomes = [
        outcome("none", 1e-3, 0, Some(0.3)),
        outcome("none", 1e-2, 0, None),
        outcome("norm:1", 1e-3, 0, Some(0.2)),
        outcome("norm:1", 1e-3, 1, Some(0.22)),
        outcome("norm:1", 1e-3, 2, Some(0.27)),
        // Lower, but of one seed only.
        outcome("norm:1", 1e-2, 0, Some(0.1)),
        outcome("norm:1.0", 1e-1, 0, None),
    ];
    let text = markdown(&outcomes);
    let lines: Vec<Vec<&str>> = text.lines().map(cells).collect();
    assert_eq!(lines[0], ["## SGD, power 4"]);
    let expected = "`norm:1`|1e-3|0.2200|0.2000 to 0.2700|3|0.2200|50 %|1.0e-3 to 1.0e-2 (1.0)|1 of 5, from 1e-1";
    assert_eq!(lines[4], cells(expected));
    let expected = "`none`|1e-3|0.3000|0.3000 to 0.3000|1|0.3000|50 %||1 of 2, from 1e-2";
    assert_eq!(lines[5], cells(expected));
    assert_eq!(lines.len(), 7);
}

#[test]
fn problems_have_tables_of_their_own() {
    let mut adam = outcome("none", 1e-3, 0, Some(0.1));
    adam.settings.optimizer = OptimizerKind::AdamW;
    let mut cubic = outcome("none", 1e-3, 0, Some(0.1));
    cubic.settings.power = 3.0;
    let text = markdown(&[adam, cubic, outcome("none", 1e-3, 0, None)]);
    let heads: Vec<&str> = text.lines().filter(|line| line.starts_with('#')).collect();
    assert_eq!(
        heads,
        ["## SGD, power 4", "## SGD, power 3", "## AdamW, power 4"]
    );
}

#[test]
fn a_rule_that_diverges_everywhere_has_no_best_rate() {
    let text = markdown(&[outcome("none", 1e-3, 0, None)]);
    let row = text.trim_end().lines().last().map(cells);
    assert_eq!(row.unwrap(), cells("`none`|-|inf||0||||1 of 1, from 1e-3"));
}
