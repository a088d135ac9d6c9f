//! The table of all methods, which parses a text into a config.

use super::adagc::AdaGc;
use super::agc::Agc;
use super::auto::AutoClip;
use super::block_rms::BlockRms;
use super::none::NoClip;
use super::norm::Norm;
use super::options::Options;
use super::param_norm::ParamNorm;
use super::quantile::QuantileClip;
use super::rule::Method;
use super::skip::SkipSteps;
use super::stabilizer::GradientStabilizer;
use super::value::Value;
use super::zclip::ZClip;
use crate::error::Result;

macro_rules! methods {
    ($($name:literal, $main:literal, $config:ident;)*) => {
        /// The config of one of the methods.
        #[derive(Debug, Clone, PartialEq)]
        pub(super) enum AnyMethod {
            $($config($config),)*
        }

        $(
            impl From<$config> for AnyMethod {
                fn from(config: $config) -> Self {
                    Self::$config(config)
                }
            }
        )*

        impl AnyMethod {
            const NAMES: &'static [&'static str] = &[$($name),*];

            /// Each method's name, and the name of its history's array in a checkpoint.
            pub(super) const ARRAYS: &'static [(&'static str, &'static str)] =
                &[$(($name, concat!("clip.", $name))),*];

            pub(super) fn name(&self) -> &'static str {
                match self {
                    $(Self::$config(_) => $name,)*
                }
            }

            /// The option whose name may be omitted.
            pub(super) fn main_option(name: &str) -> Option<&'static str> {
                match name {
                    $($name => Some($main),)*
                    _ => None,
                }
            }

            pub(super) fn parse(options: &mut Options<'_>) -> Result<Self> {
                match options.name {
                    $($name => Ok(Self::$config($config::parse(options)?)),)*
                    name => {
                        let names = Self::NAMES.join(", ");
                        options.fail(format!("no method is named `{name}`, expected one of {names}"))
                    }
                }
            }

            pub(super) fn config(&self) -> &dyn Method {
                match self {
                    $(Self::$config(config) => config,)*
                }
            }

            pub(super) fn config_mut(&mut self) -> &mut dyn Method {
                match self {
                    $(Self::$config(config) => config,)*
                }
            }
        }
    };
}

// Name, option whose name may be omitted, config.
methods! {
    "none", "", NoClip;
    "norm", "max_norm", Norm;
    "value", "clip_value", Value;
    "param-norm", "max_norm", ParamNorm;
    "block-rms", "max_rms", BlockRms;
    "auto", "percentile", AutoClip;
    "quantile", "target", QuantileClip;
    "zclip", "", ZClip;
    "adagc", "", AdaGc;
    "agc", "", Agc;
    "stabilizer", "", GradientStabilizer;
    "skip", "", SkipSteps;
}
