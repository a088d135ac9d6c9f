//! A [`Clip`] as text: `name:option=value,option=value`. The name of the main option may be
//! omitted.

use std::fmt::{self, Display};
use std::str::FromStr;

use candle_grad_clip_kernels::NormType;

use super::config::{Clip, Part};
use super::methods::AnyMethod;
use super::non_finite::NonFinite;
use super::options::{Options, Writer};
use crate::error::{Error, Result};

const POLICIES: &[(&str, NonFinite)] = &[
    ("error", NonFinite::Error),
    ("skip_step", NonFinite::SkipStep),
    ("zero", NonFinite::Zero),
    ("propagate", NonFinite::Propagate),
];

/// `name:option=value,...`: the text that [`Clip`]'s `Display` writes.
///
/// | name | options (with their defaults) |
/// |---|---|
/// | `none` | |
/// | `norm:1`, `param-norm:1` | `max_norm` |
/// | `value:1` | `clip_value` |
/// | `block-rms:1` | `max_rms` |
/// | `auto` | `percentile` (10), `window` (100000) |
/// | `quantile` | `target` (0.5), `rate` (0.2) |
/// | `zclip` | `alpha` (0.97), `z_thresh` (2.5), `warmup` (25), `deviation_eps` (1e-6), `max_norm` (1), `mode` (`zscore`, `percentile`, `mean`), `clip_scale` (1), `skip` (false) |
/// | `adagc` | `lambda_abs` (1), `lambda_rel` (1.05), `beta` (0.98), `warmup` (100) |
/// | `agc` | `clipping` (0.01), `eps` (0.001), `units` (`rows`, `columns`, `optax`), `exclude` (patterns with `\|` between them) |
/// | `stabilizer` | `gamma1` (0.7), `gamma2` (0.9) |
/// | `skip` | `norm`, `z` (6 if none of the three is given), `loss_z`, `window` (128), `max_norm` (inf) |
///
/// The name of a method's first option may be omitted: `norm:1` is `norm:max_norm=1`. Every method
/// also takes `norm_type` (1, 2, inf, any p), `eps`, `non_finite` (`error`, `skip_step`, `zero`,
/// `propagate`) and `max_skips`. The clip is checked: `norm:0` is an error.
///
/// `+` chains clips, as [`Clip::chain`] does: `value:0.1+norm:1`.
///
/// ```
/// use candle_grad_clip::{Clip, NonFinite};
///
/// let clip: Clip = "norm:0.5,non_finite=error".parse()?;
/// assert_eq!(clip, Clip::norm(0.5).non_finite(NonFinite::Error));
/// assert_eq!("zclip:z_thresh=2.5,warmup=10".parse::<Clip>()?.to_string(), "zclip:warmup=10");
/// let error = "zlcip".parse::<Clip>().unwrap_err();
/// assert!(error.to_string().contains("no method is named `zlcip`"));
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
impl FromStr for Clip {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = parts(text);
        if let [part] = parts[..] {
            return one(part);
        }
        let clips = parts.into_iter().map(one);
        Clip::chain_of(clips.collect::<Result<Vec<Clip>>>()?)
    }
}

/// Splits at each `+` that is not part of a number: `1e+3`, `=+inf`.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices('+') {
        let (before, after) = (text[..at].trim_end(), text[at + 1..].trim_start());
        let of_number =
            before.ends_with([':', '=', ',']) || after.starts_with(|c: char| c.is_ascii_digit());
        if !of_number {
            parts.push(text[start..at].trim());
            start = at + 1;
        }
    }
    parts.push(text[start..].trim());
    parts
}

fn one(text: &str) -> Result<Clip> {
    let name = text.split(':').next().unwrap_or_default();
    // An unknown name is an error below.
    let main = AnyMethod::main_option(name).unwrap_or("value");
    let mut options = Options::new(text, main)?;
    let mut clip = Clip::new(AnyMethod::parse(&mut options)?);
    let p: Option<f64> = options.take("norm_type", "1, 2, inf or any p > 0")?;
    clip.norm_type = p.map_or(clip.norm_type, NormType::from);
    for part in &mut clip.parts {
        part.eps = options.number("eps", part.eps)?;
    }
    clip.non_finite = options.word("non_finite", POLICIES, clip.non_finite)?;
    clip.max_skips = options.count("max_skips", clip.max_skips)?;
    options.finish()?;
    clip.check()?;
    Ok(clip)
}

/// Text that [`Clip`]'s `FromStr` reads back as the same clip: `none`, `norm:1`,
/// `zclip:z_thresh=3,max_norm=inf`, `value:0.1+norm:1`.
impl Display for Clip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Writer { f, written: 0 };
        for (at, Part { method, eps }) in self.parts.iter().enumerate() {
            if at > 0 {
                out.f.write_str("+")?;
            }
            out.f.write_str(method.name())?;
            out.written = 0;
            method.config().write(&mut out)?;
            out.option("eps", *eps, method.config().default_eps())?;
        }
        // These apply to the whole chain.
        out.option("norm_type", self.norm_type.p(), 2.0)?;
        out.word(
            "non_finite",
            POLICIES,
            &self.non_finite,
            &NonFinite::SkipStep,
        )?;
        out.option("max_skips", self.max_skips, 10)
    }
}

#[cfg(feature = "serde")]
impl TryFrom<String> for Clip {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(feature = "serde")]
impl From<Clip> for String {
    fn from(clip: Clip) -> Self {
        clip.to_string()
    }
}
