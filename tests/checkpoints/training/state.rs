//! The program's own state: any serde value, to the last bit; what JSON can't hold is refused.

use std::collections::BTreeMap;
use std::fs;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use support::checkpoints::{Folder, names_in};

use super::{Run, run_of};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Phase {
    WarmUp,
    Decay(f64),
    At { loss: f32, step: Option<u64> },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    epoch: u64,
    rng: u128,
    losses: Vec<f64>,
    best: Option<f64>,
    phases: (Phase, Phase, Phase),
    by_name: BTreeMap<String, f32>,
    text: String,
}

fn state() -> State {
    State {
        epoch: u64::MAX,
        rng: u128::MAX - 1,
        losses: vec![0.1 + 0.2, 5e-324, f64::MAX, -0.0],
        best: None,
        phases: (
            Phase::WarmUp,
            Phase::Decay(1.0 / 3.0),
            Phase::At {
                loss: 0.1,
                step: Some(1),
            },
        ),
        by_name: [("x".to_string(), 1e-45)].into(),
        text: "\"π\"\n".to_string(),
    }
}

#[test]
fn load_latest_returns_the_state_to_the_last_bit() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = Run::new(&folder)?;
    run.checkpoints.save(1, &run.map, &run.opt, &state())?;
    let loaded = run
        .checkpoints
        .load_latest(&run.map, &mut run.opt)?
        .unwrap();
    assert_eq!(loaded.state::<State>()?, state());
    assert!(loaded.state::<State>()?.losses[3].is_sign_negative());
    let error = loaded.state::<Vec<u8>>().unwrap_err().to_string();
    assert!(
        error.contains("state.json: the state is no alloc::vec::Vec<u8>: invalid type: map"),
        "{error}"
    );
    fs::write(folder.join("step-000001/state.json"), "[1]")?;
    let error = loaded.state::<Vec<u8>>().unwrap_err().to_string();
    assert!(
        error.contains("state.json has 3 bytes, expected "),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_state_that_json_cannot_hold_is_refused() -> Result<()> {
    let folder = Folder::in_memory()?;
    let run = run_of(&folder, 1)?;
    let refused = |state: State, expected: &str| -> Result<()> {
        let error = run
            .checkpoints
            .save(2, &run.map, &run.opt, &state)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("step-000002/state.json: the state can't be saved: "),
            "{error}"
        );
        assert!(error.contains(expected), "{error}");
        Ok(())
    };
    let with = |edit: fn(&mut State)| {
        let mut state = state();
        edit(&mut state);
        state
    };
    refused(
        with(|state| state.losses[1] = f64::NAN),
        "losses is NaN, which JSON can't hold",
    )?;
    refused(
        with(|state| state.best = Some(f64::INFINITY)),
        "best is inf, which",
    )?;
    let at = |state: &mut State| {
        state.phases.2 = Phase::At {
            loss: f32::NEG_INFINITY,
            step: None,
        }
    };
    refused(with(at), "phases.loss is -inf, which")?;
    refused(
        with(|state| state.phases.1 = Phase::Decay(f64::NAN)),
        "phases is NaN",
    )?;
    refused(
        with(|state| state.by_name = [("x".to_string(), f32::NAN)].into()),
        "by_name is NaN",
    )?;
    let pairs = BTreeMap::from([((1, 2), 3)]);
    let error = run
        .checkpoints
        .save(2, &run.map, &run.opt, &pairs)
        .unwrap_err()
        .to_string();
    assert!(error.contains("key must be a string"), "{error}");
    assert_eq!(names_in(&folder)?, ["step-000001"]);
    Ok(())
}

/// A ruined run does not replace a good checkpoint.
#[test]
fn ruined_weights_and_moments_are_refused() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = run_of(&folder, 1)?;
    run.checkpoints = run.checkpoints.clone().keep_last(1);
    let var = &run.opt.vars().vars()[0].clone();
    let whole = var.copy()?;
    var.set(&(var.as_tensor() * f64::NAN)?)?;
    let error = run.steps(2..=2).unwrap_err().to_string();
    assert!(
        error.contains("the weights are ruined: \"a.weight\" has NaN"),
        "{error}"
    );
    assert!(error.contains("step-000002/model.safetensors"), "{error}");
    var.set(&whole)?;
    assert_eq!(run.load_latest()?, Some(1));
    assert_eq!(names_in(&folder)?, ["step-000001"]);
    Ok(())
}
