//! No rule with a history freezes a model: after any history of finite norms that is followed by
//! ordinary ones, steps are taken with a coefficient above 1e-6 again, within the number of steps
//! that the rule's docs state.

use anyhow::Result;
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{AutoClip, Clip, ClippedOptimizer, StepReport};
use support::checkpoints::Folder;

use super::{Named, fused, store};

/// One step whose gradient has this norm, and its loss if there is one.
fn step(
    opt: &mut ClippedOptimizer<Sgd>,
    named: &Named,
    norm: f64,
    loss: Option<f64>,
) -> Result<StepReport> {
    let gradients = vec![
        Some(vec![0.6 * norm, 0.0, 0.0]),
        Some(vec![-0.8 * norm]),
        None,
    ];
    let store = store(named, &gradients)?;
    Ok(match loss {
        Some(loss) => opt.step_report_with_loss(&store, loss)?,
        None => opt.step_report(&store)?,
    })
}

fn start(clip: &str) -> Result<(Named, ClippedOptimizer<Sgd>)> {
    fused(clip.parse::<Clip>()?.max_skips(0)) // the first skip is an error
}

/// Histories of finite norms, each named.
fn histories(seed: u64) -> Vec<(&'static str, Vec<f64>)> {
    const STEPS: usize = 130;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut random = |range: f64, zeros: usize| -> Vec<f64> {
        let mut one = |_| match rng.usize(0..10) {
            x if x < zeros => 0.0,
            _ => 10f64.powf(range * (2.0 * rng.f64() - 1.0)),
        };
        (0..STEPS).map(&mut one).collect()
    };
    let every_other = |x, y| {
        (0..STEPS)
            .map(|at| if at % 2 == 0 { x } else { y })
            .collect()
    };
    vec![
        ("zeros", vec![0.0; STEPS]),
        ("one zero", vec![0.0]),
        ("nearly all zeros", [vec![0.0; STEPS], vec![5.0]].concat()),
        ("plateau", vec![5.0; STEPS]),
        ("tiny", vec![1e-12; STEPS]),
        ("vanishing", vec![1e-200; STEPS]),
        ("subnormal", vec![1e-310; STEPS]),
        ("huge", vec![1e12; STEPS]),
        ("near the largest", vec![1e300; STEPS]),
        ("tiny and huge", every_other(1e-12, 1e12)),
        ("zero and ordinary", every_other(0.0, 5.0)),
        ("zero and tiny", every_other(0.0, 1e-12)),
        ("random", random(1.0, 1)),
        ("wild", random(15.0, 3)),
        ("wilder", random(250.0, 3)),
    ]
}

/// The rules, and within how many steps they recover from norms of any size.
fn rules() -> Vec<(&'static str, usize)> {
    vec![
        ("auto:10,window=100", 100),
        ("auto:0,window=7", 7),
        ("auto:10", 9 * 131 + 1), // until nine in ten of the norms are ordinary
        ("quantile:0.5,rate=0.2", 7100), // ln(1 / f64::MIN_POSITIVE) / 0.1
        ("zclip:max_norm=inf", 100),
        ("zclip:max_norm=inf,mode=mean", 100),
        ("zclip:max_norm=inf,mode=percentile", 100),
        ("zclip:warmup=3", 100),
        ("zclip:warmup=120,mode=mean", 120),
        ("stabilizer", 13_200), // ln(1e300 / 1e-6) / (ln(1 / 0.9) / 2)
        ("adagc:warmup=6,beta=0.7", 47_800), // ln(1 / f64::MIN_POSITIVE) / ln(1.015), and the warm-up
    ]
}

#[test]
fn steps_are_taken_again_after_any_history() -> Result<()> {
    let folder = Folder::in_memory()?;
    let path = folder.join("optimizer.safetensors");
    for (clip, bound) in rules() {
        for seed in 0..2 {
            for (history, norms) in histories(seed) {
                let what = format!("{clip}, {history}, {seed}");
                let (named, mut opt) = start(clip)?;
                for norm in norms {
                    let report = step(&mut opt, &named, norm, None)?;
                    let coef = report.clip_coef()?;
                    // (The norm of the smallest numbers' squares may be 0.)
                    assert!(coef > 0.0 || report.total_norm()? == 0.0, "{what}");
                }
                let (mut named, mut opt) = (named, opt);
                if seed == 1 {
                    opt.save(&path)?;
                    (named, opt) = fused(Clip::none())?;
                    opt.load(&path)?;
                }
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut ordinary = || 4.0 + 2.0 * rng.f64();
                // A history that holds nothing down is followed by fewer steps.
                let mut recovered = 0;
                for at in 0..bound + 100 {
                    let coef = step(&mut opt, &named, ordinary(), None)?.clip_coef()?;
                    assert!(coef > 0.0, "{what}: step {at}");
                    recovered = if coef > 1e-6 { recovered + 1 } else { 0 };
                    assert!(recovered > 0 || at < bound, "{what}: step {at}, {coef}");
                    if recovered > 200 {
                        break;
                    }
                }
                assert!(recovered >= 100, "{what}: {recovered}");
            }
        }
    }
    Ok(())
}

#[test]
fn zclip_goes_on_after_a_warm_up_of_zeros() -> Result<()> {
    for mode in ["zscore", "mean", "percentile"] {
        for skip in [false, true] {
            let clip = format!("zclip:max_norm=inf,mode={mode},skip={skip}");
            let (named, mut opt) = start(&clip)?;
            for _ in 0..30 {
                assert!(!step(&mut opt, &named, 0.0, None)?.was_clipped()?, "{clip}");
            }
            // The warm-up begins here: of these 25 norms the last is 5.24, the mean 5.12.
            for at in 0..25 {
                let report = step(&mut opt, &named, 5.0 + 0.01 * f64::from(at), None)?;
                assert_eq!(report.clip_coef()?, 1.0, "{clip}");
            }
            for _ in 0..1000 {
                let report = step(&mut opt, &named, 5.12, None)?;
                assert_eq!(report.clip_coef()?, 1.0, "{clip}");
            }
        }
    }
    Ok(())
}

#[test]
fn autoclip_goes_on_after_zeros() -> Result<()> {
    let all = 5.0 / (5.0 + 1e-6);
    for clip in ["auto:10", "auto:10,window=100"] {
        let (named, mut opt) = start(clip)?;
        for _ in 0..130 {
            step(&mut opt, &named, 0.0, None)?;
        }
        for _ in 0..1000 {
            assert_eq!(step(&mut opt, &named, 5.0, None)?.clip_coef()?, all);
        }
        let (named, mut opt) = start(clip)?;
        for at in 0..2000 {
            let norm = if at % 5 == 4 { 0.0 } else { 5.0 };
            let report = step(&mut opt, &named, norm, None)?;
            assert_eq!(report.clip_coef()?, if norm == 0.0 { 1.0 } else { all });
        }
    }
    Ok(())
}

#[test]
fn a_limit_of_another_length_keeps_no_zeros() -> Result<()> {
    let (named, mut opt) = start("auto:10")?;
    for norm in [3.0, 0.0, 5.0, 0.0] {
        step(&mut opt, &named, norm, None)?;
    }
    let percentile = 0.0;
    let window = Some(2);
    opt.set_clip(AutoClip { percentile, window }.into())?;
    // The window has 3 and 5; the 3 leaves.
    let report = step(&mut opt, &named, 9.0, None)?;
    assert!((report.record()?.clipped_norm - 5.0).abs() < 1e-5);
    Ok(())
}

/// A step of norm 0 is none of AdaGC's warm-up: the limit of all Vars holds for two steps with
/// gradients.
#[test]
fn the_warm_up_of_adagc_counts_no_zeros() -> Result<()> {
    let (named, mut opt) = start("adagc:warmup=2,lambda_abs=1")?;
    let mut coefs = Vec::new();
    for norm in [0.0, 0.0, 0.0, 4.0, 0.0, 2.0, 2.0] {
        coefs.push(step(&mut opt, &named, norm, None)?.clip_coef()?);
    }
    let right = [1.0, 1.0, 1.0, 0.25, 1.0, 0.5, 1.05 / 2.0]; // each Var's mean makes the norm 1
    for (coef, right) in coefs.iter().zip(right) {
        assert!((coef - right).abs() < 1e-12, "{coefs:?}");
    }
    Ok(())
}

#[test]
fn skipping_takes_what_is_like_a_plateau() -> Result<()> {
    for level in [1e-9, 1.0, 3.7, 1e12] {
        let clip = "skip:z=6,loss_z=6,window=16";
        let (named, mut opt) = start(clip)?;
        let (of_zclip, mut zclip) = start("zclip:max_norm=inf,skip=true")?;
        for at in 0..60 {
            let next = if at % 2 == 0 {
                level
            } else {
                1.000_001 * level
            };
            let norm = if at < 30 { level } else { next };
            step(&mut opt, &named, norm, Some(norm))?;
            step(&mut zclip, &of_zclip, norm, None)?;
        }
        // What is no plateau any more is refused.
        for (norm, loss) in [(2.0 * level, level), (level, 2.0 * level + 1e-3)] {
            step(&mut opt, &named, norm, Some(loss)).unwrap_err();
        }
        if level > 1e-6 {
            // (ZClip's own eps is larger than a norm below.)
            step(&mut zclip, &of_zclip, 2.0 * level, None).unwrap_err();
        }
    }
    Ok(())
}

/// Whatever the history, norms and losses of its lower end, and a little above, are taken at once.
#[test]
fn skipping_takes_what_is_like_its_history() -> Result<()> {
    for seed in 0..20 {
        for (history, norms) in histories(seed) {
            let clip = "skip:z=3,loss_z=3,window=16".parse::<Clip>()?;
            let (named, mut opt) = fused(clip.max_skips(1000))?;
            let mut taken = Vec::new();
            for norm in norms {
                let report = step(&mut opt, &named, norm, Some(norm))?;
                if !report.skipped()? && report.total_norm()? > 0.0 {
                    taken.push(norm);
                }
            }
            let window = &taken[taken.len().saturating_sub(16)..];
            let least = window.iter().copied().fold(f64::INFINITY, f64::min);
            let least = if least < f64::INFINITY { least } else { 5.0 };
            for at in 0..50 {
                let norm = least * (1.0 + 1e-4 * f64::from(at % 7));
                let report = step(&mut opt, &named, norm, Some(norm))?;
                assert!(!report.skipped()?, "{history}, {seed}: step {at}");
            }
        }
    }
    Ok(())
}

/// Masked batches: loss and norm are 0.
#[test]
fn losses_of_steps_without_a_gradient_do_not_enter() -> Result<()> {
    let (named, mut opt) = start("skip:loss_z=6,window=16")?;
    for _ in 0..40 {
        step(&mut opt, &named, 0.0, Some(0.0))?;
    }
    for at in 0..100 {
        let zero = at % 3 == 0;
        let loss = 2.0 + 0.1 * f64::from(at % 7);
        step(
            &mut opt,
            &named,
            if zero { 0.0 } else { 1.0 },
            Some(if zero { 0.0 } else { loss }),
        )?;
    }
    // Losses of 0 with a gradient are losses as any, and their last digits no reason to skip.
    let (named, mut opt) = start("skip:loss_z=6,window=16")?;
    for at in 0..60 {
        let loss = if at < 30 { 0.0 } else { 1e-7 };
        step(&mut opt, &named, 1.0, Some(loss))?;
    }
    Ok(())
}

#[test]
fn the_report_counts_tiny_coefficients_in_a_row() -> Result<()> {
    let (named, mut opt) = fused(Clip::norm(1e-7))?;
    let mut counts = Vec::new();
    // NaN is skipped, and neither it nor a norm of 0 ends the row; an ordinary coefficient does.
    for norm in [5.0, 5.0, f64::NAN, 0.0, 5.0, 1e-3, 5.0] {
        let report = step(&mut opt, &named, norm, None)?;
        assert_eq!(
            report.record()?.tiny_coefs_in_a_row,
            report.record()?.tiny_coefs_in_a_row
        );
        counts.push(report.record()?.tiny_coefs_in_a_row);
    }
    assert_eq!(counts, [1, 2, 2, 2, 3, 0, 1]);
    Ok(())
}

/// A large norm is ordinary to a rule that sets the length.
#[test]
fn the_stabilizers_coefficients_are_never_counted_as_tiny() -> Result<()> {
    let (named, mut opt) = fused(Clip::stabilizer())?;
    for _ in 0..12 {
        let report = step(&mut opt, &named, 1e12, None)?;
        let record = report.record()?;
        assert!(record.clip_coef < 1e-11 && record.clipped_norm > 1.0);
        assert_eq!(record.tiny_coefs_in_a_row, 0);
    }
    Ok(())
}
