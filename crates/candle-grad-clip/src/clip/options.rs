//! Parses and writes the options of a method as text.

use std::fmt::{self, Display};
use std::str::FromStr;

use crate::error::{Error, Result};

/// The options of a text. Each is taken once.
pub(super) struct Options<'a> {
    text: &'a str,
    pub(super) name: &'a str,
    given: Vec<(&'a str, &'a str)>,
    allowed: Vec<&'static str>,
}

impl<'a> Options<'a> {
    /// Splits a text. A first option without a name is the option `main`.
    pub(super) fn new(text: &'a str, main: &'static str) -> Result<Self> {
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

    pub(super) fn fail<T>(&self, reason: String) -> Result<T> {
        Err(Error::InvalidClip {
            text: self.text.to_string(),
            reason,
        })
    }

    /// Takes an option, if it is given.
    pub(super) fn take<T: FromStr>(
        &mut self,
        key: &'static str,
        expected: &str,
    ) -> Result<Option<T>> {
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

    pub(super) fn number(&mut self, key: &'static str, default: f64) -> Result<f64> {
        Ok(self.take(key, "a number")?.unwrap_or(default))
    }

    pub(super) fn count<T: FromStr>(&mut self, key: &'static str, default: T) -> Result<T> {
        Ok(self.take(key, "a whole number")?.unwrap_or(default))
    }

    /// An option whose value is one of `words`.
    pub(super) fn word<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&str, T)],
        default: T,
    ) -> Result<T> {
        let Some(given) = self.take::<String>(key, "a word")? else {
            return Ok(default);
        };
        match words.iter().find(|(word, _)| *word == given) {
            Some((_, meaning)) => Ok(*meaning),
            None => self.fail(format!(
                "option `{key}` is `{given}`, expected {}",
                any_of(words)
            )),
        }
    }

    /// A required option.
    pub(super) fn main(&mut self, key: &'static str) -> Result<f64> {
        match self.take(key, "a number")? {
            Some(value) => Ok(value),
            None => self.fail(format!("expected a {key}, such as `{}:1`", self.name)),
        }
    }

    /// An error if an option is left: it is unknown.
    pub(super) fn finish(&self) -> Result<()> {
        let Some((key, _)) = self.given.first() else {
            return Ok(());
        };
        let (name, allowed) = (self.name, self.allowed.join(", "));
        self.fail(format!(
            "`{name}` has no option `{key}`, expected one of {allowed}"
        ))
    }
}

/// Writes the options that differ from their defaults.
pub(super) struct Writer<'a, 'f> {
    pub(super) f: &'a mut fmt::Formatter<'f>,
    pub(super) written: usize,
}

impl Writer<'_, '_> {
    /// Writes an option whose value is one of `words`.
    pub(super) fn word<T: PartialEq>(
        &mut self,
        key: &str,
        words: &[(&str, T)],
        value: &T,
        default: &T,
    ) -> fmt::Result {
        let found = words.iter().find(|(_, meaning)| meaning == value);
        match found {
            Some((word, _)) if value != default => self.option(key, *word, ""),
            _ => Ok(()),
        }
    }

    pub(super) fn main(&mut self, value: f64) -> fmt::Result {
        self.written += 1;
        write!(self.f, ":{value}")
    }

    pub(super) fn option<T: Display + PartialEq + Copy>(
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

/// `rows, columns or optax`.
fn any_of<T>(words: &[(&str, T)]) -> String {
    let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    match &words[..] {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => words.concat(),
    }
}
