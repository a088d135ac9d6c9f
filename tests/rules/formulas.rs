//! Every method over 120 random histories.

use anyhow::Result;
use candle_grad_clip::{Clip, SkipReason};
use support::device::backends;
use support::oracle::{assert_all_close, assert_close};

use super::{Gradients, fused, plain, random_history, step};

const HISTORIES: u64 = 120;
const STEPS: usize = 40;

fn norm_of<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    values.into_iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn total_norm(gradients: &[Option<Vec<f64>>]) -> f64 {
    norm_of(gradients.iter().flatten().flatten())
}

fn param_norms(gradients: &[Option<Vec<f64>>]) -> Vec<f64> {
    let norm = |gradient: &Option<Vec<f64>>| gradient.as_ref().map_or(0.0, norm_of);
    gradients.iter().map(norm).collect()
}

/// A method once more: the coefficient of each Var, or none to skip the step.
type Formula = Box<dyn FnMut(&Gradients) -> Option<Vec<f64>>>;

/// The same limit for the norm of all.
fn global(mut max_norm: impl FnMut(f64) -> Option<f64> + 'static) -> Formula {
    Box::new(move |gradients| {
        let norm = total_norm(gradients);
        let coef = (max_norm(norm)? / (norm + 1e-6)).min(1.0);
        Some(vec![coef; gradients.len()])
    })
}

/// `numpy.percentile`.
fn percentile(values: &[f64], percentile: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let position = percentile / 100.0 * (sorted.len() - 1) as f64;
    let (low, part) = (position as usize, position.fract());
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] * (1.0 - part) + sorted[high] * part
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn squares(values: &[f64]) -> f64 {
    let mean = mean(values);
    values.iter().map(|x| (x - mean).powi(2)).sum()
}

/// Runs a method and its formula side by side.
fn compare(clip: &Clip, mut formula: impl FnMut() -> Formula) -> Result<()> {
    let (mut clipped, mut skipped) = (0, 0);
    for seed in 0..HISTORIES {
        let backend = backends()[seed as usize % 2];
        let clip = clip.clone().max_skips(1000);
        let (named, mut of_candle) = plain(clip.clone())?;
        let (named_fused, mut of_ours) = fused(clip.clone())?;
        let mut formula = formula();
        for (at, mut gradients) in random_history(seed, STEPS).into_iter().enumerate() {
            let what = format!("{clip}, history {seed}, step {at}, {backend:?}");
            let bad = at % 11 == 10 && gradients[0].is_some();
            if bad && let Some(gradient) = &mut gradients[0] {
                gradient[1] = f64::NAN;
            }
            let (got, report) = if seed % 4 < 2 {
                step(&mut of_candle, &named, &gradients, backend)?
            } else {
                step(&mut of_ours, &named_fused, &gradients, backend)?
            };
            if bad {
                assert_eq!(
                    report.record()?.skip_reason,
                    Some(SkipReason::NonFinite),
                    "{what}"
                );
                continue; // and the formula never hears of it
            }
            if total_norm(&gradients) == 0.0 {
                assert!(!report.skipped()? && got.concat().iter().all(|x| *x == 0.0));
                continue; // nor of a step in which there is nothing to clip
            }
            let coefs = formula(&gradients);
            let taken = coefs.clone().unwrap_or(vec![0.0; gradients.len()]);
            let mut right = Vec::new();
            for ((gradient, coef), size) in gradients.iter().zip(&taken).zip(super::SIZES) {
                let gradient = gradient.clone().unwrap_or(vec![0.0; size]);
                right.push(gradient.iter().map(|x| x * coef).collect::<Vec<f64>>());
            }
            let scale = total_norm(&gradients).max(1e-300);
            let relative = |values: &[Vec<f64>]| -> Vec<f64> {
                values.concat().iter().map(|x| x / scale).collect()
            };
            assert_all_close(&relative(&got), &relative(&right), 1e-12, &what);
            let expected = coefs.is_none().then_some(SkipReason::LargeNorm);
            assert_eq!(report.record()?.skip_reason, expected, "{what}");
            assert_eq!(report.skipped()?, coefs.is_none(), "{what}");
            assert_eq!(report.record()?.non_finite, 0, "{what}");
            assert_close(report.total_norm()?, total_norm(&gradients), 1e-12, &what);
            let norm = norm_of(right.iter().flatten());
            assert_close(report.record()?.clipped_norm, norm, 1e-12, &what);
            let present = gradients.iter().zip(&taken);
            let present = present.filter(|(gradient, _)| gradient.is_some());
            let smallest = present.map(|(_, coef)| *coef).fold(f64::INFINITY, f64::min);
            assert_close(report.clip_coef()?, smallest, 1e-12, &what);
            clipped += u32::from(report.was_clipped()?);
            skipped += u32::from(report.record()?.skip_reason == Some(SkipReason::LargeNorm));
        }
    }
    // The histories show the method at work.
    let steps = HISTORIES as u32 * STEPS as u32;
    assert!(
        clipped + skipped > steps / 20,
        "{clip}: {clipped}, {skipped}"
    );
    Ok(())
}

#[test]
fn param_norm() -> Result<()> {
    compare(&Clip::param_norm(0.5), || {
        Box::new(|gradients| {
            let coef = |norm: f64| (0.5 / (norm + 1e-6)).min(1.0);
            Some(param_norms(gradients).into_iter().map(coef).collect())
        })
    })
}

#[test]
fn block_rms() -> Result<()> {
    compare(&Clip::block_rms(0.25), || {
        Box::new(|gradients| {
            let norms = param_norms(gradients).into_iter().zip(super::SIZES);
            let rms = norms.map(|(norm, n)| norm / (n as f64).sqrt());
            Some(rms.map(|rms| 1.0 / (rms / 0.25).max(1.0)).collect())
        })
    })
}

#[test]
fn autoclip() -> Result<()> {
    for (text, p, window) in [
        ("auto", 10.0, usize::MAX),
        ("auto:62.5", 62.5, usize::MAX),
        ("auto:30,window=6", 30.0, 6),
    ] {
        let formula = || {
            let mut norms = Vec::new();
            global(move |norm| {
                norms.push(norm);
                let start = norms.len().saturating_sub(window);
                Some(percentile(&norms[start..], p))
            })
        };
        compare(&text.parse()?, formula)?;
    }
    Ok(())
}

#[test]
fn quantile() -> Result<()> {
    compare(&"quantile:0.6,rate=0.25".parse()?, || {
        let mut max_norm = f64::INFINITY;
        global(move |norm| {
            let limit = max_norm;
            if limit.is_infinite() && norm > 0.0 {
                max_norm = norm;
            }
            if max_norm.is_finite() {
                let b = f64::from(u8::from(norm <= max_norm));
                max_norm *= (-0.25 * (b - 0.6)).exp();
            }
            Some(limit)
        })
    })
}

#[test]
fn zclip() -> Result<()> {
    for mode in ["zscore", "mean", "percentile"] {
        for skip in [false, true] {
            for (z_thresh, max_norm, clip_scale) in [(1.2, f64::INFINITY, 1.0), (0.8, 2.0, 0.9)] {
                let text = format!(
                    "zclip:alpha=0.9,z_thresh={z_thresh},warmup=6,mode={mode},skip={skip},max_norm={max_norm},\
                     clip_scale={clip_scale}"
                );
                compare(&text.parse()?, || {
                    let (alpha, mut warmup) = (0.9, Vec::new());
                    let mut statistics: Option<(f64, f64)> = None;
                    global(move |norm| {
                        let Some((m, v)) = &mut statistics else {
                            warmup.push(norm);
                            if warmup.len() == 6 {
                                statistics = Some((mean(&warmup), squares(&warmup) / 6.0));
                            }
                            return Some(max_norm);
                        };
                        let z = (norm - *m) / (v.sqrt() + 1e-6);
                        let limit = match mode {
                            "percentile" => *m + z_thresh * v.sqrt(),
                            "mean" => *m,
                            _ => clip_scale * (*m + z_thresh * z_thresh * v.sqrt() / z),
                        };
                        let spike = if mode == "percentile" {
                            norm > limit
                        } else {
                            z > z_thresh
                        };
                        if spike && skip {
                            return None;
                        }
                        let x = if spike { limit } else { norm };
                        *m = alpha * *m + (1.0 - alpha) * x;
                        *v = alpha * *v + (1.0 - alpha) * (x - *m).powi(2);
                        Some(if spike { limit.min(max_norm) } else { max_norm })
                    })
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn adagc() -> Result<()> {
    compare(&"adagc:warmup=8,lambda_abs=0.7,beta=0.9".parse()?, || {
        let mut means = [None::<f64>; 3];
        let mut t = 0;
        Box::new(move |gradients| {
            let all = (0.7 / total_norm(gradients)).min(1.0);
            let mut coefs = Vec::new();
            for (norm, mean) in param_norms(gradients).into_iter().zip(&mut means) {
                let h = match *mean {
                    Some(mean) if t >= 8 => (1.05 * mean / norm).min(1.0),
                    _ => all,
                };
                if norm > 0.0 {
                    *mean = Some(match *mean {
                        None => h * norm,
                        Some(mean) if t < 8 => mean.min(h * norm),
                        Some(mean) => 0.9 * mean + 0.1 * h * norm,
                    });
                }
                coefs.push(if norm > 0.0 { h } else { 1.0 });
            }
            t += 1;
            Some(coefs)
        })
    })
}

/// The paper's equations, with `m`, `v` and their corrections.
#[test]
fn stabilizer() -> Result<()> {
    for (text, gamma1, gamma2) in [
        ("stabilizer", 0.7, 0.9),
        ("stabilizer:gamma1=0,gamma2=0.999", 0.0, 0.999),
        ("stabilizer:gamma1=0.9,gamma2=0.6", 0.9, 0.6),
    ] {
        compare(&text.parse()?, || {
            let mut of_vars = [(0.0f64, 0.0f64, 0); 3];
            Box::new(move |gradients| {
                let mut coefs = Vec::new();
                for (norm, (m, v, t)) in param_norms(gradients).into_iter().zip(&mut of_vars) {
                    if norm == 0.0 {
                        coefs.push(1.0);
                        continue;
                    }
                    *t += 1;
                    *m = gamma1 * *m + (1.0 - gamma1) * norm;
                    *v = gamma2 * *v + (1.0 - gamma2) * norm * norm;
                    let m_hat = *m / (1.0 - f64::powi(gamma1, *t));
                    let v_hat = *v / (1.0 - f64::powi(gamma2, *t));
                    coefs.push(m_hat / (v_hat.sqrt() + 1e-8) / norm);
                }
                Some(coefs)
            })
        })?;
    }
    Ok(())
}

#[test]
fn skip_above_norm() -> Result<()> {
    compare(&Clip::skip_above_norm(3.0), || {
        global(|norm| (norm <= 3.0).then_some(f64::INFINITY))
    })?;
    compare(&"skip:norm=3,max_norm=0.5".parse()?, || {
        global(|norm| (norm <= 3.0).then_some(0.5))
    })
}

#[test]
fn skip_above_zscore() -> Result<()> {
    compare(&"skip:z=1.5,window=10".parse()?, || {
        let mut norms = Vec::new();
        global(move |norm| {
            let latest = &norms[norms.len().saturating_sub(10)..];
            if latest.len() >= 5 {
                let deviation = (squares(latest) / (latest.len() - 1) as f64).sqrt();
                if norm - mean(latest) > 1.5 * deviation {
                    return None;
                }
            }
            norms.push(norm);
            Some(f64::INFINITY)
        })
    })
}
