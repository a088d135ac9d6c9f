//! Two sentences that follow from the numbers, whatever these say.

use crate::baseline::Baselines;
use crate::experiment::Experiment;
use crate::score::USABLE_WITHIN;
use crate::standing::Standing;
use crate::tables::{number, range};

/// Best losses that differ by less than this share count as equal: seeds differ by more.
const EQUAL_WITHIN: f64 = 0.02;

/// Does clipping help, and what does it not do? Nothing without an arm that clips and one that
/// doesn't.
#[must_use]
pub fn sentences(standings: &[Standing], experiment: &Experiment) -> Vec<String> {
    if experiment.interrupted() {
        return vec!["Interrupted: no conclusion from a part of the runs.".to_owned()];
    }
    let none = standings.iter().find(|standing| standing.arm.is_none());
    let clipped = standings
        .iter()
        .find(|standing| standing.arm.method() == "norm");
    let clipped = clipped.or_else(|| standings.iter().find(|standing| !standing.arm.is_none()));
    let (Some(none), Some(clipped)) = (none, clipped) else {
        return Vec::new();
    };
    vec![
        on_range(standings, none, clipped),
        on_best(none, clipped, &experiment.baselines),
    ]
}

fn on_range(standings: &[Standing], none: &Standing, clipped: &Standing) -> String {
    let each: Vec<String> = standings
        .iter()
        .map(|standing| {
            let diverged = format!("{} of {}", standing.diverged().count(), standing.runs.len());
            format!(
                "{}: {}, {diverged} runs diverged",
                standing.arm,
                range(standing.usable)
            )
        })
        .collect();
    let gain = clipped.usable_decades() - none.usable_decades();
    let verdict = if clipped.usable.is_some() && none.usable.is_none() {
        "makes rates usable where, of the rates tried, none is without clipping".to_owned()
    } else if gain > 0.0 {
        format!("widens the range of usable rates by {gain:.1} decades")
    } else if gain < 0.0 {
        format!("narrows the range of usable rates by {:.1} decades", -gain)
    } else {
        "doesn't change the range of usable rates".to_owned()
    };
    format!(
        "Learning rates within {USABLE_WITHIN}x of the best loss of all arms, {}; so {} {verdict}.",
        each.join("; "),
        clipped.arm
    )
}

fn on_best(none: &Standing, clipped: &Standing, baselines: &Baselines) -> String {
    let ((none_lr, none_loss), (lr, loss)) = (none.best, clipped.best);
    if !(none_loss.is_finite() && loss.is_finite()) {
        let which = if loss.is_finite() {
            &none.arm
        } else {
            &clipped.arm
        };
        return format!("At no learning rate of this sweep did {which} reach a finite loss.");
    }
    let change = loss / none_loss - 1.0;
    let verdict = if change.abs() <= EQUAL_WITHIN {
        "the forecast itself gains nothing, only the choice of the rate gets easy".to_owned()
    } else if change < 0.0 {
        format!("{:.0} % lower", -100.0 * change)
    } else {
        format!(
            "{:.0} % higher: where a low rate is affordable, it does without clipping",
            100.0 * change
        )
    };
    let runs = clipped.at_best();
    let clipped_fraction =
        runs.iter().map(|run| run.clipped_fraction).sum::<f64>() / runs.len() as f64;
    let rescaling = if clipped_fraction > 0.95 {
        ", so nearly all of them, which acts as a lower learning rate that follows the norm"
    } else {
        ""
    };
    let beaten = if loss < baselines.persistence {
        "less"
    } else {
        "more"
    };
    format!(
        "At its own best rate, {lr:e}, {} reaches a test loss of {} against {} unclipped at {none_lr:e}: \
         {verdict}; that is {beaten} than persistence ({}), and {:.0} % of its steps were clipped{rescaling}.",
        clipped.arm,
        number(loss),
        number(none_loss),
        number(baselines.persistence),
        100.0 * clipped_fraction
    )
}
