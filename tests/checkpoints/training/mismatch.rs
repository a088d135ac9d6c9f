//! What does not fit is named, and nothing is changed, also not by an older checkpoint.

use anyhow::Result;
use candle_core::DType;
use candle_grad_clip::optim::{AdamW, Sgd};
use candle_grad_clip::{Clip, ClippedOptimizer, Error};
use candle_nn::{Optimizer, ParamsAdamW, SGD};
use support::checkpoints::Folder;

use super::{Run, run_of};

type Vars<'a> = &'a [(&'a str, &'a [usize], DType)];

/// The differences that a model with these Vars meets.
fn differences(vars: Vars<'_>) -> Result<String> {
    let folder = Folder::in_memory()?;
    run_of(&folder, 2)?;
    let mut run = Run::of(&folder, vars)?;
    run.step()?;
    let before = run.everything()?;
    let error = run.load_latest().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::CheckpointMismatch { .. }), "{text}");
    assert!(
        text.contains("step-000002/model.safetensors does not fit"),
        "{text}"
    );
    assert_eq!(run.everything()?, before);
    Ok(text)
}

#[test]
fn load_latest_names_the_var_of_another_shape() -> Result<()> {
    let text = differences(&[
        ("a.weight", &[3, 2], DType::F32),
        ("b.bias", &[4], DType::F64),
    ])?;
    assert!(
        text.ends_with("other shapes: \"a.weight\" is [2, 3] in the file, [3, 2] here"),
        "{text}"
    );
    Ok(())
}

#[test]
fn load_latest_names_the_var_of_another_dtype() -> Result<()> {
    let text = differences(&[
        ("a.weight", &[2, 3], DType::BF16),
        ("b.bias", &[4], DType::F64),
    ])?;
    assert!(
        text.ends_with("other dtypes: \"a.weight\" is f32 in the file, bf16 here"),
        "{text}"
    );
    Ok(())
}

#[test]
fn load_latest_names_the_vars_that_are_more_or_fewer() -> Result<()> {
    let (a, b) = (
        ("a.weight", &[2usize, 3] as &[usize], DType::F32),
        ("b.bias", &[4usize] as &[usize], DType::F64),
    );
    let text = differences(&[a, b, ("c", &[1], DType::F32)])?;
    assert!(
        text.ends_with("Vars that are not in the file: \"c\""),
        "{text}"
    );
    let text = differences(&[a])?;
    assert!(
        text.ends_with("Vars that are only in the file: \"b.bias\""),
        "{text}"
    );
    let text = differences(&[a, ("bias", b.1, b.2)])?;
    assert!(
        text.contains("not in the file: \"bias\"; Vars that are only in the file: \"b.bias\""),
        "{text}"
    );
    Ok(())
}

#[test]
fn load_latest_names_another_optimizer() -> Result<()> {
    fn mismatch<O: Optimizer + 'static>(run: &Run, inner: O) -> Result<String> {
        let mut opt = ClippedOptimizer::wrap(inner, &run.map, Clip::norm(1.0))?;
        let error = run.checkpoints.load_latest(&run.map, &mut opt).unwrap_err();
        assert!(matches!(error, Error::CheckpointMismatch { .. }), "{error}");
        Ok(error.to_string())
    }
    let folder = Folder::in_memory()?;
    run_of(&folder, 2)?;
    let run = Run::new(&folder)?;
    let before = run.everything()?;
    let text = mismatch(&run, Sgd::from_named_vars(&run.map, 0.1)?)?;
    assert!(
        text.ends_with("the optimizer is AdamW in the file, Sgd here"),
        "{text}"
    );
    let text = mismatch(&run, SGD::new(run.map.all_vars(), 0.1)?)?;
    assert!(
        text.ends_with("the optimizer is AdamW in the file, candle_nn::optim::SGD here"),
        "{text}"
    );
    let master = AdamW::from_named_vars(&run.map, ParamsAdamW::default())?.master_weights(true);
    let text = mismatch(&run, master)?;
    assert!(
        text.ends_with("master_weights is false in the file, true here"),
        "{text}"
    );
    assert_eq!(run.everything()?, before);
    Ok(())
}

/// The whole model belongs into a checkpoint, by name.
#[test]
fn save_and_load_latest_name_vars_that_are_left_out() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = run_of(&folder, 1)?;
    let part = super::map_of(&[("a.weight", &[2, 3], DType::F32)])?;
    let save = run.checkpoints.save(2, &part, &run.opt, &()).unwrap_err();
    let load = run
        .checkpoints
        .load_latest(&part, &mut run.opt)
        .unwrap_err();
    for error in [save, load].map(|error| error.to_string()) {
        assert!(
            error.contains(
                "not among those of the model: \"a.weight\", \"b.bias\"; expected the whole model"
            ),
            "{error}"
        );
    }
    let error = run
        .checkpoints
        .save(2, run.map.all_vars(), &run.opt, &())
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the Vars have no names but their places"),
        "{error}"
    );
    assert_eq!(run.checkpoints.list()?.len(), 1);
    assert_eq!(support::checkpoints::names_in(&folder)?, ["step-000001"]);
    Ok(())
}
