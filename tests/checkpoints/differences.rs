//! A file of another optimizer is refused: all that differs is named, and nothing is changed.

use std::fs;

use anyhow::{Context, Result};
use candle_core::{DType, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, Error, NamedVars};
use candle_nn::ParamsAdamW;
use support::checkpoints::Folder;
use support::device::device;
use support::gradients::bits_of_vars;

use super::resume::{Trains, gradients, optimizer, pair, small};

/// What `load` says of a file that `saved` wrote, to an optimizer that then goes on as if nothing
/// had been.
fn refusal(
    saved: &dyn Trains,
    vars: &NamedVars,
    make: &dyn Fn(&NamedVars) -> Result<Box<dyn Trains>>,
) -> Result<Error> {
    let folder = Folder::new()?;
    let path = folder.join("o");
    saved.save(&path)?;
    let ones = |var: &Var| var.set(&var.ones_like()?);
    let mut runs = Vec::new();
    let mut error = None;
    for tries in [false, true] {
        vars.vars().iter().try_for_each(ones)?;
        let mut opt = make(vars)?;
        opt.train(&gradients(vars, 1)?)?;
        if tries {
            error = opt.load(&path).err();
        }
        opt.train(&gradients(vars, 2)?)?;
        opt.save(&folder.join("after"))?;
        runs.push((bits_of_vars(vars.vars())?, fs::read(folder.join("after"))?));
    }
    assert_eq!(runs[0], runs[1]);
    error.context("it was loaded")
}

const F32: DType = DType::F32;

fn var(shape: &[usize], dtype: DType) -> Result<Var> {
    Ok(Var::ones(shape, dtype, device())?)
}

/// Vars of these names, shapes and dtypes.
fn model(names: &[(&str, &[usize], DType)]) -> Result<NamedVars> {
    let pairs: Vec<(String, Var)> = names
        .iter()
        .map(|(name, shape, dtype)| Ok(pair(name, &var(shape, *dtype)?)))
        .collect::<Result<_>>()?;
    Ok(pairs.into())
}

/// The one that loads.
fn here() -> Result<NamedVars> {
    model(&[
        ("a", &[2, 3], F32),
        ("b", &[3], F32),
        ("c", &[], F32),
        ("d", &[4], F32),
    ])
}

/// Why an optimizer of the Vars `here` refuses the file of another, of the Vars `there`.
fn refused(
    here: &NamedVars,
    there: &NamedVars,
    scenario: &'static str,
    ours: &'static str,
) -> Result<Error> {
    let mut saved = optimizer(scenario, there, None)?;
    saved.train(&gradients(there, 2)?)?;
    let make_ours = move |vars: &NamedVars| optimizer(ours, vars, Some(Clip::norm(1.0)));
    refusal(saved.as_ref(), here, &make_ours)
}

fn differences(error: Error) -> Vec<String> {
    match error {
        Error::CheckpointMismatch { differences, .. } => differences,
        other => panic!("{other}"),
    }
}

#[test]
fn what_differs_is_named() -> Result<()> {
    let here = here()?;
    let there = model(&[
        ("a", &[3, 2], F32),
        ("b", &[3], DType::BF16),
        ("c", &[], F32),
        ("e", &[4], F32),
    ])?;
    let error = refused(&here, &there, "adamw", "adamw")?;
    let text = error.to_string();
    assert!(
        text.contains(" does not fit, nothing was changed: "),
        "{text}"
    );
    assert_eq!(
        differences(error),
        [
            "Vars that are not in the file: \"d\"",
            "Vars that are only in the file: \"e\"",
            "other shapes: \"a\" is [3, 2] in the file, [2, 3] here",
            "other dtypes: \"b\" is bf16 in the file, f32 here",
        ]
    );
    // A dtype of the same size, whose arrays look alike.
    let there = model(&[
        ("a", &[2, 3], F32),
        ("b", &[3], DType::F16),
        ("c", &[], F32),
        ("d", &[4], F32),
    ])?;
    let expected = ["other dtypes: \"b\" is f16 in the file, f32 here"];
    assert_eq!(
        differences(refused(&here, &there, "adamw", "adamw")?),
        expected
    );

    let many: Vec<(String, Var)> = (0..25)
        .map(|i| Ok(pair(&format!("v{i}"), &var(&[], F32)?)))
        .collect::<Result<_>>()?;
    let text = refused(&here, &many.into(), "adamw", "adamw")?.to_string();
    assert!(text.contains("\"v8\", \"v9\" and 15 more"), "{text}");
    Ok(())
}

#[test]
fn another_optimizer_is_named() -> Result<()> {
    let here = here()?;
    for (there, ours, expected) in [
        (
            "sgd",
            "adamw",
            "the optimizer is Sgd in the file, AdamW here",
        ),
        (
            "adamw",
            "momentum",
            "the optimizer is AdamW in the file, Sgd here",
        ),
        (
            "adamw",
            "amsgrad",
            "amsgrad is false in the file, true here",
        ),
        (
            "amsgrad",
            "adamw",
            "amsgrad is true in the file, false here",
        ),
        (
            "master",
            "adamw",
            "master_weights is true in the file, false here",
        ),
        (
            "nesterov",
            "nesterov_master",
            "master_weights is false in the file, true here",
        ),
    ] {
        assert_eq!(differences(refused(&here, &here, there, ours)?), [expected]);
    }
    Ok(())
}

#[test]
fn the_way_a_file_is_missing_is_said() -> Result<()> {
    let folder = Folder::new()?;
    let (_, named) = small()?;
    let mut opt = AdamW::from_named_vars(named, ParamsAdamW::default())?;
    let error = opt.load(folder.join("nothing")).unwrap_err();
    assert!(
        matches!(&error, Error::CheckpointIo { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    assert!(
        error
            .to_string()
            .starts_with(&format!("checkpoint {}", folder.join("nothing").display())),
        "{error}"
    );
    let error = opt.load(&*folder).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
    if cfg!(unix) {
        assert!(opt.load("/dev/zero").is_err());
    }
    Ok(())
}
