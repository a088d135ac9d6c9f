//! A [`Clip`] as text, as command lines write it: `name:option=value,option=value`, the main option without its name.

use std::fmt::{self, Display};
use std::str::FromStr;

use candle_grad_clip_kernels::NormType;

use super::{
    AdaGc, Agc, AgcUnits, AutoClip, Clip, Method, NonFinite, QuantileClip, Rule, SkipSteps, ZClip,
    ZClipMode, agc,
};
use crate::error::{Error, Result};

const NAMES: &str =
    "none, norm, value, param-norm, block-rms, auto, quantile, zclip, adagc, agc, skip";

/// The options of a text, each taken once.
struct Options<'a> {
    text: &'a str,
    name: &'a str,
    given: Vec<(&'a str, &'a str)>,
    allowed: Vec<&'static str>,
}

impl<'a> Options<'a> {
    /// Splits a text; an option without a name goes by `main`.
    fn new(text: &'a str, main: &'static str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        let mut options = Self {
            text,
            name,
            given: Vec::new(),
            allowed: Vec::new(),
        };
        for (place, option) in rest.split(',').enumerate() {
            let option = option.trim();
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key.trim(), value.trim()),
                None if rest.trim().is_empty() => continue,
                None if place == 0 && !main.is_empty() => (main, option),
                None => {
                    let reason = format!("option `{option}` has no value, expected option=value");
                    return options.fail(reason);
                }
            };
            if options.given.iter().any(|(other, _)| *other == key) {
                return options.fail(format!("option `{key}` is given twice"));
            }
            options.given.push((key, value));
        }
        Ok(options)
    }

    fn fail<T>(&self, reason: String) -> Result<T> {
        Err(Error::InvalidClip {
            text: self.text.to_string(),
            reason,
        })
    }

    /// An option that may be given.
    fn take<T: FromStr>(&mut self, key: &'static str, expected: &str) -> Result<Option<T>> {
        self.allowed.push(key);
        let Some(place) = self.given.iter().position(|(given, _)| *given == key) else {
            return Ok(None);
        };
        let (_, value) = self.given.remove(place);
        match value.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => self.fail(format!("option `{key}` is `{value}`, expected {expected}")),
        }
    }

    fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.take(key, "a number")?.unwrap_or(default))
    }

    fn count<T: FromStr>(&mut self, key: &'static str, default: T) -> Result<T> {
        Ok(self.take(key, "a whole number")?.unwrap_or(default))
    }

    /// An option that must be given.
    fn main(&mut self, key: &'static str) -> Result<f64> {
        match self.take(key, "a number")? {
            Some(value) => Ok(value),
            None => self.fail(format!("expected a {key}, such as `{}:1`", self.name)),
        }
    }

    /// What is left is unknown.
    fn finish(&self) -> Result<()> {
        let Some((key, _)) = self.given.first() else {
            return Ok(());
        };
        let (name, allowed) = (self.name, self.allowed.join(", "));
        self.fail(format!(
            "`{name}` has no option `{key}`, expected one of {allowed}"
        ))
    }
}

fn method(options: &mut Options<'_>) -> Result<Clip> {
    Ok(match options.name {
        "none" => Clip::none(),
        "norm" => Clip::norm(options.main("max_norm")?),
        "value" => Clip::value(options.main("clip_value")?),
        "param-norm" => Clip::param_norm(options.main("max_norm")?),
        "block-rms" => Clip::block_rms(options.main("max_rms")?),
        "auto" => AutoClip {
            percentile: options.number("percentile", AutoClip::default().percentile)?,
            window: options.take("window", "a whole number")?,
        }
        .into(),
        "quantile" => QuantileClip {
            target: options.number("target", QuantileClip::default().target)?,
            rate: options.number("rate", QuantileClip::default().rate)?,
        }
        .into(),
        "zclip" => zclip(options)?.into(),
        "adagc" => {
            let AdaGc {
                lambda_abs,
                lambda_rel,
                beta,
                warmup,
            } = AdaGc::default();
            AdaGc {
                lambda_abs: options.number("lambda_abs", lambda_abs)?,
                lambda_rel: options.number("lambda_rel", lambda_rel)?,
                beta: options.number("beta", beta)?,
                warmup: options.count("warmup", warmup)?,
            }
            .into()
        }
        "agc" => agc(options)?.into(),
        "skip" => {
            let default = SkipSteps::default();
            let norm = options.take("norm", "a number")?;
            let z = options.take("z", "a number")?;
            let loss_z = options.take("loss_z", "a number")?;
            // OLMo's, where nothing is said.
            let is_said = norm.is_some() || loss_z.is_some();
            let otherwise = if is_said { default.z } else { 6.0 };
            SkipSteps {
                norm: norm.unwrap_or(default.norm),
                z: z.unwrap_or(otherwise),
                loss_z: loss_z.unwrap_or(default.loss_z),
                window: options.count("window", default.window)?,
                max_norm: options.number("max_norm", default.max_norm)?,
            }
            .into()
        }
        name => {
            return options.fail(format!(
                "no method is named `{name}`, expected one of {NAMES}"
            ));
        }
    })
}

fn agc(options: &mut Options<'_>) -> Result<Agc> {
    let default = Agc::default();
    let exclude = options.take::<String>("exclude", "patterns of names")?;
    let patterns = exclude.iter().flat_map(|text| text.split('|'));
    Ok(Agc {
        clipping: options.number("clipping", default.clipping)?,
        eps: default.eps, // taken as that of all clips
        units: match options.take::<String>("units", "a word")?.as_deref() {
            None => default.units,
            Some("rows") => AgcUnits::Rows,
            Some("columns") => AgcUnits::Columns,
            Some("optax") => AgcUnits::Optax,
            Some(other) => {
                let allowed = "rows, columns or optax";
                return options.fail(format!("option `units` is `{other}`, expected {allowed}"));
            }
        },
        exclude: patterns.map(ToString::to_string).collect(),
    })
}

fn zclip(options: &mut Options<'_>) -> Result<ZClip> {
    let default = ZClip::default();
    Ok(ZClip {
        alpha: options.number("alpha", default.alpha)?,
        z: options.number("z", default.z)?,
        warmup: options.count("warmup", default.warmup)?,
        eps: options.number("deviation_eps", default.eps)?,
        max_norm: options.number("max_norm", default.max_norm)?,
        mode: match options.take::<String>("mode", "a word")?.as_deref() {
            None => default.mode,
            Some("zscore") => ZClipMode::ZScore,
            Some("percentile") => ZClipMode::Percentile,
            Some("mean") => ZClipMode::Mean,
            Some(other) => {
                let allowed = "zscore, percentile or mean";
                return options.fail(format!("option `mode` is `{other}`, expected {allowed}"));
            }
        },
        clip_scale: options.number("clip_scale", default.clip_scale)?,
        skip: options
            .take("skip", "true or false")?
            .unwrap_or(default.skip),
    })
}

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
/// | `zclip` | `alpha` (0.97), `z` (2.5), `warmup` (25), `deviation_eps` (1e-6), `max_norm` (1), `mode` (`zscore`, `percentile`, `mean`), `clip_scale` (1), `skip` (false) |
/// | `adagc` | `lambda_abs` (1), `lambda_rel` (1.05), `beta` (0.98), `warmup` (100) |
/// | `agc` | `clipping` (0.01), `eps` (0.001), `units` (`rows`, `columns`, `optax`), `exclude` (patterns with `\|` between them) |
/// | `skip` | `norm`, `z` (6 if none of the three is given), `loss_z`, `window` (128), `max_norm` (inf) |
///
/// The first option of a name may come without its own name: `norm:1` is `norm:max_norm=1`. All take `norm_type` (1, 2,
/// inf, any p), `eps`, `non_finite` (`error`, `skip_step`, `zero`, `propagate`) and `max_skips` as well. The clip is checked: `norm:0`
/// is an error here.
///
/// `+` puts clips one after the other, as [`Clip::all`] does: `value:0.1+norm:1`.
///
/// ```
/// use candle_grad_clip::{Clip, NonFinite};
///
/// let clip: Clip = "norm:0.5,non_finite=error".parse()?;
/// assert_eq!(clip, Clip::norm(0.5).non_finite(NonFinite::Error));
/// assert_eq!("zclip:z=2.5,warmup=10".parse::<Clip>()?.to_string(), "zclip:warmup=10");
/// let error = "zlcip".parse::<Clip>().unwrap_err();
/// assert!(error.to_string().contains("no method is named `zlcip`"));
/// # Ok::<(), candle_grad_clip::Error>(())
/// ```
impl FromStr for Clip {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parts = parts(text);
        let mut clips = parts.iter().map(|part| one(part));
        if let [_] = parts[..]
            && let Some(clip) = clips.next()
        {
            return clip;
        }
        Clip::all(clips.collect::<Result<Vec<Clip>>>()?)
    }
}

/// What is between `+`, but for those of a number: `1e+3`, `=+inf`.
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
    let main = match name {
        "norm" | "param-norm" => "max_norm",
        "value" => "clip_value",
        "block-rms" => "max_rms",
        "auto" => "percentile",
        "quantile" => "target",
        "none" | "zclip" | "adagc" | "agc" | "skip" => "",
        _ => "value", // unknown, which is said below
    };
    let mut options = Options::new(text, main)?;
    let mut clip = method(&mut options)?;
    let p: Option<f64> = options.take("norm_type", "1, 2, inf or any p > 0")?;
    clip.norm_type = p.map_or(clip.norm_type, NormType::from);
    for rule in &mut clip.rules {
        rule.eps = options.number("eps", rule.eps)?;
    }
    clip.non_finite = match options.take::<String>("non_finite", "a word")?.as_deref() {
        None => clip.non_finite,
        Some("error") => NonFinite::Error,
        Some("skip_step") => NonFinite::SkipStep,
        Some("zero") => NonFinite::Zero,
        Some("propagate") => NonFinite::Propagate,
        Some(other) => {
            let allowed = "error, skip_step, zero or propagate";
            return options.fail(format!(
                "option `non_finite` is `{other}`, expected {allowed}"
            ));
        }
    };
    clip.max_skips = options.count("max_skips", clip.max_skips)?;
    options.finish()?;
    clip.check()?;
    Ok(clip)
}

/// Writes options that are not at their default.
struct Writer<'a, 'f> {
    f: &'a mut fmt::Formatter<'f>,
    written: usize,
}

impl Writer<'_, '_> {
    fn main(&mut self, value: f64) -> fmt::Result {
        self.written += 1;
        write!(self.f, ":{value}")
    }

    fn option<T: Display + PartialEq + Copy>(
        &mut self,
        key: &str,
        value: T,
        default: T,
    ) -> fmt::Result {
        if value == default {
            return Ok(());
        }
        let before = if self.written == 0 { ':' } else { ',' };
        self.written += 1;
        write!(self.f, "{before}{key}={value}")
    }
}

impl Method {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Norm { .. } => "norm",
            Self::Value { .. } => "value",
            Self::ParamNorm { .. } => "param-norm",
            Self::BlockRms { .. } => "block-rms",
            Self::Auto(_) => "auto",
            Self::Quantile(_) => "quantile",
            Self::ZClip(_) => "zclip",
            Self::AdaGc(_) => "adagc",
            Self::Agc(_) => "agc",
            Self::Skip(_) => "skip",
        }
    }
}

/// Text that [`Clip`]'s `FromStr` reads back as the same clip: `none`, `norm:1`, `zclip:z=3,max_norm=inf`, `value:0.1+norm:1`.
impl Display for Clip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut written = 0;
        for (at, rule) in self.rules.iter().enumerate() {
            if at > 0 {
                f.write_str("+")?;
            }
            written = write_rule(rule, f)?;
        }
        // These hold for all.
        let mut out = Writer { f, written };
        out.option("norm_type", self.norm_type.p(), 2.0)?;
        let non_finite = match self.non_finite {
            NonFinite::Error => "error",
            NonFinite::SkipStep => "skip_step",
            NonFinite::Zero => "zero",
            NonFinite::Propagate => "propagate",
        };
        out.option("non_finite", non_finite, "skip_step")?;
        out.option("max_skips", self.max_skips, 10)
    }
}

/// Writes one rule, and returns how many options it wrote.
fn write_rule(rule: &Rule, f: &mut fmt::Formatter<'_>) -> std::result::Result<usize, fmt::Error> {
    f.write_str(rule.method.name())?;
    let mut out = Writer { f, written: 0 };
    match &rule.method {
        Method::None => {}
        Method::Norm { max_norm: limit }
        | Method::ParamNorm { max_norm: limit }
        | Method::Value { clip_value: limit }
        | Method::BlockRms { max_rms: limit } => out.main(*limit)?,
        Method::Auto(rule) => {
            out.main(rule.percentile)?;
            if let Some(window) = rule.window {
                out.option("window", window, 0)?;
            }
        }
        Method::Quantile(rule) => {
            out.main(rule.target)?;
            out.option("rate", rule.rate, QuantileClip::default().rate)?;
        }
        Method::ZClip(rule) => write_zclip(&mut out, rule)?,
        Method::AdaGc(rule) => {
            let default = AdaGc::default();
            out.option("lambda_abs", rule.lambda_abs, default.lambda_abs)?;
            out.option("lambda_rel", rule.lambda_rel, default.lambda_rel)?;
            out.option("beta", rule.beta, default.beta)?;
            out.option("warmup", rule.warmup, default.warmup)?;
        }
        Method::Agc(rule) => write_agc(&mut out, rule)?,
        Method::Skip(rule) => {
            let default = SkipSteps::default();
            out.option("norm", rule.norm, default.norm)?;
            // Without all three, reading it would give z its default.
            let never = if rule.norm == default.norm && rule.loss_z == default.loss_z {
                0.0
            } else {
                default.z
            };
            out.option("z", rule.z, never)?;
            out.option("loss_z", rule.loss_z, default.loss_z)?;
            out.option("window", rule.window, default.window)?;
            out.option("max_norm", rule.max_norm, default.max_norm)?;
        }
    }
    out.option("eps", rule.eps, rule.method.default_eps())?;
    Ok(out.written)
}

fn write_agc(out: &mut Writer<'_, '_>, rule: &agc::Rule) -> fmt::Result {
    out.option("clipping", rule.clipping, Agc::default().clipping)?;
    let units = match rule.units {
        AgcUnits::Rows => "rows",
        AgcUnits::Columns => "columns",
        AgcUnits::Optax => "optax",
    };
    out.option("units", units, "rows")?;
    out.option("exclude", rule.exclude.join("|").as_str(), "")
}

fn write_zclip(out: &mut Writer<'_, '_>, rule: &ZClip) -> fmt::Result {
    let default = ZClip::default();
    out.option("alpha", rule.alpha, default.alpha)?;
    out.option("z", rule.z, default.z)?;
    out.option("warmup", rule.warmup, default.warmup)?;
    out.option("deviation_eps", rule.eps, default.eps)?;
    out.option("max_norm", rule.max_norm, default.max_norm)?;
    let mode = match rule.mode {
        ZClipMode::ZScore => "zscore",
        ZClipMode::Percentile => "percentile",
        ZClipMode::Mean => "mean",
    };
    out.option("mode", mode, "zscore")?;
    out.option("clip_scale", rule.clip_scale, default.clip_scale)?;
    out.option("skip", rule.skip, default.skip)
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
