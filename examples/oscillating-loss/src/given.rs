//! Which options the command line itself has, apart from defaults.

use anyhow::{Context, Result, ensure};
use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

use crate::settings::Settings;
use crate::source::Source;

/// Arguments, and the names of those that were given.
#[derive(Debug)]
pub struct Given<T> {
    /// All arguments, with their defaults.
    pub args: T,
    /// The fields that the command line gave a value.
    names: Vec<String>,
}

impl<T> Given<T> {
    /// Whether a run goes as the given options say; what was not given may differ, and so may
    /// `steps`, which must not be lower.
    ///
    /// # Errors
    /// The first option that contradicts the run.
    pub fn check(&self, asked: (&Settings, &Source), run: (&Settings, &Source)) -> Result<()> {
        let (asked_steps, steps) = (asked.0.steps, run.0.steps);
        let same_arm = asked.0.arm == run.0.arm;
        let (asked, run) = (fields(asked)?, fields(run)?);
        // An arm may be written in another way.
        let differs = |name: &&String| *name != "steps" && !(*name == "clip" && same_arm);
        for name in self.names.iter().filter(differs) {
            let field = if name == "clip" { "arm" } else { name };
            if let (Some(asked), Some(run)) = (asked.get(field), run.get(field)) {
                ensure!(
                    asked == run,
                    "--{} {} contradicts the run to resume, which has {}: leave it out",
                    name.replace('_', "-"),
                    text(asked),
                    text(run)
                );
            }
        }
        ensure!(
            asked_steps >= steps || !self.names.iter().any(|name| name == "steps"),
            "--steps {asked_steps} contradicts the run to resume, which has {steps}: expected as many or \
             more"
        );
        Ok(())
    }
}

fn fields((settings, source): (&Settings, &Source)) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    for part in [
        serde_json::to_value(settings)?,
        serde_json::to_value(source)?,
    ] {
        all.extend(part.as_object().context("settings have names")?.clone());
    }
    Ok(all)
}

fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

impl<T: FromArgMatches> FromArgMatches for Given<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given =
            |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
        Ok(Self {
            args: T::from_arg_matches(matches)?,
            names: matches
                .ids()
                .filter(given)
                .map(ToString::to_string)
                .collect(),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl<T: Args> Args for Given<T> {
    fn augment_args(command: Command) -> Command {
        T::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        T::augment_args_for_update(command)
    }
}
