//! Errors that wait until everything that can be done is done: a full disk must not cost what needs
//! no disk.

use anyhow::{Result, anyhow};

/// What went wrong so far.
#[derive(Debug, Default)]
pub struct Late(Vec<anyhow::Error>);

impl Late {
    /// Keeps the error, if there is one.
    pub fn keep(&mut self, result: Result<()>) {
        self.0.extend(result.err());
    }

    /// Nothing is left to do.
    ///
    /// # Errors
    /// If there were any; each is named.
    pub fn end(mut self) -> Result<()> {
        match self.0.len() {
            0 => Ok(()),
            1 => Err(self.0.remove(0)),
            _ => {
                let all: Vec<String> = self.0.iter().map(|error| format!("{error:#}")).collect();
                Err(anyhow!("{}", all.join("; ")))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_named() {
        let error = |text: &str| Err(anyhow!("{text}").context("can't"));
        let mut late = Late::default();
        late.keep(Ok(()));
        late.keep(error("a"));
        late.keep(Ok(()));
        late.keep(error("b"));
        assert_eq!(late.end().unwrap_err().to_string(), "can't: a; can't: b");
        let mut late = Late::default();
        late.keep(error("a"));
        assert_eq!(format!("{:#}", late.end().unwrap_err()), "can't: a");
        Late::default().end().unwrap();
    }
}
