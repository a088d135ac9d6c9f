//! The history of a rule in a checkpoint.

use anyhow::Result;
use candle_grad_clip::{Clip, ClippedOptimizer};
use support::checkpoints::{Folder, edited, with_tensor};
use support::device::kernels;

use super::{fused, random_history, step, with_history};

const N: usize = 20;

#[test]
fn n_steps_saved_and_n_more_are_2n() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    for clip in with_history() {
        for seed in 0..5 {
            for n in [3, N] {
                let history = random_history(seed, 2 * N);
                let (named, mut whole) = fused(clip.clone())?;
                let mut right = Vec::new();
                for gradients in &history {
                    right.push(step(&mut whole, &named, gradients, kernels())?);
                }
                let (named, mut first) = fused(clip.clone())?;
                for gradients in &history[..n] {
                    step(&mut first, &named, gradients, kernels())?;
                }
                first.save(&path)?;
                // Vars in another order, by a wrapper that knows nothing of the clip.
                let (named, _) = fused(Clip::none())?;
                let turned: Vec<_> = named.iter().rev().cloned().collect();
                let inner = candle_grad_clip::optim::Sgd::from_named_vars(turned.clone(), 1.0)?;
                let mut second = ClippedOptimizer::wrap(inner, turned, Clip::none())?;
                second.load(&path)?;
                assert_eq!(second.clip(), &clip);
                for (gradients, (right, report)) in history[n..].iter().zip(&right[n..]) {
                    let (got, resumed) = step(&mut second, &named, gradients, kernels())?;
                    assert!(close(&got, right), "{clip}, {seed}");
                    assert_eq!(
                        resumed.record()?.skip_reason,
                        report.record()?.skip_reason,
                        "{clip}"
                    );
                    assert_eq!(resumed.step(), report.step(), "{clip}");
                }
            }
        }
    }
    Ok(())
}

/// In another order of the Vars the norm has other roundings.
fn close(got: &[Vec<f64>], right: &[Vec<f64>]) -> bool {
    let mut pairs = got.iter().flatten().zip(right.iter().flatten());
    pairs.all(|(x, y)| (x - y).abs() <= 1e-12 * y.abs())
}

#[test]
fn in_the_same_order_the_bits_are_equal() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    for clip in with_history() {
        let history = random_history(9, 2 * N);
        let (named, mut whole) = fused(clip.clone())?;
        let (named_resumed, mut resumed) = fused(clip.clone())?;
        for gradients in &history {
            // Saved and loaded in every step.
            resumed.save(&path)?;
            let (_, next) = fused(Clip::none())?;
            let inner = candle_grad_clip::optim::Sgd::from_named_vars(named_resumed.clone(), 1.0)?;
            drop(next);
            resumed = ClippedOptimizer::wrap(inner, named_resumed.clone(), Clip::none())?;
            resumed.load(&path)?;
            let right = step(&mut whole, &named, gradients, kernels())?.0;
            let got = step(&mut resumed, &named_resumed, gradients, kernels())?.0;
            assert_eq!(got, right, "{clip}");
        }
    }
    Ok(())
}

#[test]
fn a_file_without_a_history_loads_and_one_with_a_bad_history_does_not() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let (named, mut opt) = fused(Clip::autoclip(10.0))?;
    for gradients in random_history(1, 5) {
        step(&mut opt, &named, &gradients, kernels())?;
    }
    opt.save(&path)?;
    let bytes = std::fs::read(&path)?;
    let (_, mut other) = fused(Clip::norm(1.0))?;
    for bad in [
        serde_json::json!({"auto": [1.0, 2.0]}), // they are an array of the file
        serde_json::json!({"of_vars": {"auto": {"layer0": [1.0]}}}), // its numbers are of no Var
        serde_json::json!({"of_vars": {"adagc": {"layer0": [1.0]}}}), // the clip is another
        serde_json::json!({"other": 1}),
    ] {
        let bad = edited(&bytes, |_, document| document["wrapper"]["rule"] = bad)?;
        std::fs::write(&path, bad)?;
        other.load(&path).unwrap_err();
        assert_eq!(other.clip(), &Clip::norm(1.0));
    }
    for number in [-2.0, f64::NAN, f64::INFINITY] {
        let bad = with_tensor(&bytes, "clip.auto", |data| {
            data[8..16].copy_from_slice(&number.to_le_bytes());
        })?;
        std::fs::write(&path, bad)?;
        let error = other.load(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("history has {number}")), "{error}");
        assert_eq!(other.clip(), &Clip::norm(1.0));
    }
    let (_, fresh) = fused(Clip::autoclip(10.0))?;
    fresh.save(&path)?;
    other.load(&path)?;
    assert_eq!(other.clip(), &Clip::autoclip(10.0));
    Ok(())
}

#[test]
fn the_means_of_vars_that_are_not_here_are_refused() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let (named, mut opt) = fused(Clip::adagc())?;
    for gradients in random_history(1, 5) {
        step(&mut opt, &named, &gradients, kernels())?;
    }
    opt.save(&path)?;
    let bytes = std::fs::read(&path)?;
    let (_, mut other) = fused(Clip::norm(1.0))?;
    for (var, number, expected) in [
        ("z", 1.0, "Vars that are not here: z"),
        ("layer0", -1.0, "history has -1"),
    ] {
        let bad = edited(&bytes, |_, document| {
            document["wrapper"]["rule"]["of_vars"]["adagc"][var] = vec![number].into();
        })?;
        std::fs::write(&path, bad)?;
        let error = other.load(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(other.clip(), &Clip::norm(1.0));
    }
    Ok(())
}

#[test]
fn bad_means_of_the_stabilizer_are_refused() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let (named, mut opt) = fused(Clip::stabilizer())?;
    for gradients in random_history(1, 5) {
        step(&mut opt, &named, &gradients, kernels())?;
    }
    opt.save(&path)?;
    let bytes = std::fs::read(&path)?;
    let (_, mut other) = fused(Clip::norm(1.0))?;
    for bad in [
        vec![1.0],
        vec![1.0, -1.0, 2.0],
        vec![1.0, 1.0, 0.0],
        vec![1.0; 4],
    ] {
        let bad = edited(&bytes, |_, document| {
            document["wrapper"]["rule"]["of_vars"]["stabilizer"]["layer0"] = bad.into();
        })?;
        std::fs::write(&path, bad)?;
        let error = other.load(&path).unwrap_err().to_string();
        assert!(error.contains("expected two means and a count"), "{error}");
        assert_eq!(other.clip(), &Clip::norm(1.0));
    }
    Ok(())
}

/// A list of rules with a pattern for names, as it was; for Vars that it does not fit it is
/// refused, and nothing is changed.
#[test]
fn a_list_with_patterns_comes_back() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    let text =
        "auto:40,eps=0+agc:clipping=0.02,exclude=layer1|*2,eps=0.01+norm:1,norm_type=1,max_skips=7";
    let (named, mut opt) = fused(text.parse()?)?;
    for gradients in random_history(1, 5) {
        step(&mut opt, &named, &gradients, kernels())?;
    }
    opt.save(&path)?;
    let (named_other, mut other) = fused(Clip::none())?;
    other.load(&path)?;
    assert_eq!(other.clip().to_string(), text);
    for gradients in random_history(2, 5) {
        let (got, _) = step(&mut other, &named_other, &gradients, kernels())?;
        let (right, _) = step(&mut opt, &named, &gradients, kernels())?;
        assert_eq!(got, right);
    }
    let bytes = std::fs::read(&path)?;
    for (from, to) in [
        ("layer1", "head"),
        ("layer1", ""),
        ("+norm:1", "+auto"),
        ("norm:1", "value:1"),
    ] {
        let bad = edited(&bytes, |_, document| {
            let clip = &mut document["wrapper"]["clip"];
            *clip = clip.as_str().unwrap().replace(from, to).into();
        })?;
        std::fs::write(&path, bad)?;
        let (_, mut other) = fused(Clip::norm(3.0))?;
        let error = other.load(&path).unwrap_err();
        assert_eq!(other.clip(), &Clip::norm(3.0), "{error}");
        assert_eq!(other.inner().steps(), 0, "{error}");
    }
    Ok(())
}
