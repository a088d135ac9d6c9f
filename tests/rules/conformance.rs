//! The cases of other implementations' own tests.

use anyhow::Result;
use candle_grad_clip::{Clip, SkipReason, ZClip, ZClipMode};
use support::device::{backends, kernels};
use support::oracle::{assert_all_close, assert_close};

use super::{Gradients, plain, step};

/// Gradients of this norm.
fn of_norm(norm: f64) -> Gradients {
    vec![
        Some(vec![0.6 * norm, 0.0, 0.0]),
        Some(vec![-0.8 * norm]),
        None,
    ]
}

/// optax' `_clipping_test.py`: 50 rounds of `clip_by_block_rms(1 / i)` on ([500, 5], [300, 3]).
#[test]
fn optax_block_rms() -> Result<()> {
    for backend in backends() {
        for round in 1..=50 {
            let max_rms = 1.0 / f64::from(round);
            let (named, mut opt) = plain(Clip::block_rms(max_rms))?;
            let gradients = vec![Some(vec![500.0, 5.0, 5.0]), Some(vec![300.0]), None];
            let (once, _) = step(&mut opt, &named, &gradients, backend)?;
            for values in &once[..2] {
                let square = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
                assert_close(square.sqrt(), max_rms, 1e-12, "rms");
            }
            let again = vec![Some(once[0].clone()), Some(once[1].clone()), None];
            let (twice, _) = step(&mut opt, &named, &again, backend)?;
            assert_all_close(&twice.concat(), &once.concat(), 1e-12, "clipped again");
        }
    }
    Ok(())
}

/// Keras' `clipnorm=1` on [100, 100].
#[test]
fn keras_clipnorm() -> Result<()> {
    for backend in backends() {
        let (named, mut opt) = plain(Clip::param_norm(1.0).eps(0.0))?;
        let gradients = vec![Some(vec![100.0, 100.0, 0.0]), Some(vec![0.5]), None];
        let (got, report) = step(&mut opt, &named, &gradients, backend)?;
        let half = 0.5f64.sqrt();
        assert_all_close(
            &got.concat()[..4],
            &[half, half, 0.0, 0.5],
            1e-12,
            "clipped",
        );
        assert!(report.was_clipped()?);
    }
    Ok(())
}

/// ZClip's tests: mean 1, variance 0.25, z 2, norm 3.
#[test]
fn zclip_limits() -> Result<()> {
    for backend in backends() {
        for (mode, limit) in [
            (ZClipMode::ZScore, 1.5),
            (ZClipMode::Mean, 1.0),
            (ZClipMode::Percentile, 2.0),
        ] {
            let rule = ZClip {
                z_thresh: 2.0,
                warmup: 2,
                max_norm: f64::INFINITY,
                mode,
                ..ZClip::default()
            };
            let (named, mut opt) = plain(rule.into())?;
            for norm in [0.5, 1.5] {
                let (_, report) = step(&mut opt, &named, &of_norm(norm), backend)?;
                assert!(!report.was_clipped()?);
            }
            let (_, report) = step(&mut opt, &named, &of_norm(3.0), backend)?;
            // The eps of 1e-6 in z and in the coefficient.
            assert_close(report.record()?.clipped_norm, limit, 2e-6, "limit");
        }
    }
    Ok(())
}

/// ZClip's tests: the statistics are ready after the last step of the warm-up, and `skip` keeps
/// them.
#[test]
fn zclip_warmup_and_skip() -> Result<()> {
    let rule = ZClip {
        warmup: 5,
        max_norm: f64::INFINITY,
        skip: true,
        ..ZClip::default()
    };
    let (named, mut opt) = plain(rule.into())?;
    for norm in [1.0, 1.1, 0.9, 1e3, 1.0] {
        // A spike in the warm-up is not one yet.
        assert!(
            !step(&mut opt, &named, &of_norm(norm), kernels())?
                .1
                .skipped()?
        );
    }
    let (named, mut opt) = plain(rule.into())?;
    for norm in [1.0, 1.1, 0.9, 1.05, 0.95] {
        step(&mut opt, &named, &of_norm(norm), kernels())?;
    }
    for _ in 0..8 {
        let (got, report) = step(&mut opt, &named, &of_norm(1e3), kernels())?;
        assert_eq!(report.record()?.skip_reason, Some(SkipReason::LargeNorm));
        assert!(got.concat().iter().all(|x| *x == 0.0));
    }
    assert!(
        !step(&mut opt, &named, &of_norm(1.1), kernels())?
            .1
            .skipped()?
    );
    Ok(())
}

/// Megatron's: limit 1, 2x2 ones.
#[test]
fn megatron_skips_above_a_limit() -> Result<()> {
    for backend in backends() {
        let (named, mut opt) = plain(Clip::skip_above_norm(1.0))?;
        let ones = vec![None, None, Some(vec![1.0; 4])];
        let (got, report) = step(&mut opt, &named, &ones, backend)?;
        assert_eq!(report.total_norm()?, 2.0);
        assert_eq!(report.record()?.skip_reason, Some(SkipReason::LargeNorm));
        assert_eq!(got[2], [0.0; 4]);
        let (got, report) = step(&mut opt, &named, &of_norm(0.5), backend)?;
        assert!(!report.skipped()? && !report.was_clipped()?);
        assert_eq!(got[1], [-0.4]);
    }
    Ok(())
}

/// OLMo-core's: a norm of 1e9 is skipped, the next normal one is taken. (With one norm before there
/// is no deviation: OLMo-core would skip everything, here the rule waits for two.)
#[test]
fn olmo_skips_a_spike_and_goes_on() -> Result<()> {
    for backend in backends() {
        let (named, mut opt) = plain("skip:z=1,window=2".parse()?)?;
        for (norm, skipped) in [
            (2.0, false),
            (2.5, false),
            (1e9, true),
            (2.2, false),
            (1e9, true),
        ] {
            let (_, report) = step(&mut opt, &named, &of_norm(norm), backend)?;
            assert_eq!(report.skipped()?, skipped, "{norm}");
        }
    }
    // By default after 64 norms.
    let (named, mut opt) = plain(Clip::skip_above_zscore(6.0))?;
    for at in 0..64 {
        let norm = if at % 2 == 0 { 1.0 } else { 1.5 };
        assert!(
            !step(&mut opt, &named, &of_norm(norm), kernels())?
                .1
                .skipped()?
        );
    }
    assert!(
        step(&mut opt, &named, &of_norm(9.0), kernels())?
            .1
            .skipped()?
    );
    Ok(())
}
