//! The norm of each Var's gradient at each step, before clipping: a table, and a heat map of it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_grad_clip::StepReport;
use plot::HeatMap;

/// A row a step, a column a Var.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParamNorms {
    names: Vec<String>,
    /// None for a Var without a gradient.
    steps: Vec<Vec<Option<f64>>>,
}

impl ParamNorms {
    /// A table of these Vars, without steps.
    #[must_use]
    pub fn new(names: &[String]) -> Self {
        Self {
            names: names.to_vec(),
            steps: Vec::new(),
        }
    }

    /// Adds the next step.
    ///
    /// # Errors
    /// If the norms have to be read from a GPU, and that fails.
    pub fn add(&mut self, report: &StepReport) -> Result<()> {
        let record = report.record()?;
        let norm = |(name, norm): &(String, f64)| {
            let is_missing = record.missing_grads.contains(name);
            Some(*norm).filter(|_| !is_missing)
        };
        self.steps
            .push(record.param_norms.iter().map(norm).collect());
        Ok(())
    }

    /// The steps that were added.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Writes a line a step: its number, then the norms; a field is empty where a gradient was
    /// missing.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn write_csv(&self, path: &Path) -> Result<()> {
        let mut writer = csv::Writer::from_path(path)?;
        writer
            .write_record(std::iter::once("step").chain(self.names.iter().map(String::as_str)))?;
        for (step, norms) in (1..).zip(&self.steps) {
            let field =
                |norm: &Option<f64>| norm.map_or_else(String::new, |norm| format!("{norm:?}"));
            let step: usize = step;
            writer
                .write_record(std::iter::once(step.to_string()).chain(norms.iter().map(field)))?;
        }
        Ok(writer.flush()?)
    }

    /// Reads back what [`write_csv`](Self::write_csv) wrote, to the last bit.
    ///
    /// # Errors
    /// If the file can't be read, or is something else.
    pub fn read_csv(path: &Path) -> Result<Self> {
        let mut reader = csv::Reader::from_path(path)?;
        let names: Vec<String> = reader
            .headers()?
            .iter()
            .skip(1)
            .map(str::to_owned)
            .collect();
        let mut table = Self::new(&names);
        for record in reader.records() {
            let record = record?;
            let step = table.len() + 1;
            ensure!(
                record.get(0) == Some(&*step.to_string()),
                "expected step {step}"
            );
            let norm = |field: &str| match field {
                "" => Ok(None),
                norm => norm.parse().map(Some),
            };
            let norms = record.iter().skip(1).map(norm).collect::<Result<_, _>>();
            table
                .steps
                .push(norms.with_context(|| format!("step {step}"))?);
        }
        Ok(table)
    }

    /// A row a Var, a column a step.
    #[must_use]
    pub fn heat_map(&self, title: String) -> HeatMap {
        let row = |(at, name): (usize, &String)| {
            let norms = self
                .steps
                .iter()
                .map(|norms| norms.get(at).copied().flatten());
            (name.clone(), norms.collect())
        };
        HeatMap {
            title,
            x_label: "step".into(),
            value_label: "norm of the Var's gradient, before clipping".into(),
            x: (1..=self.len()).map(|step| step as f64).collect(),
            rows: self.names.iter().enumerate().map(row).collect(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Device, Tensor, Var};
    use candle_grad_clip::optim::Sgd;
    use candle_grad_clip::{Clip, ClippedOptimizer, NonFinite};

    use super::*;

    /// Three steps: w's gradient is (3, 4) times 1, 2 and infinity, that of b, a scalar, 0; c has
    /// none.
    fn three_steps() -> ParamNorms {
        let var = |values: &[f64]| Var::new(values, &Device::Cpu).unwrap();
        let (w, b, c) = (var(&[1.0, 1.0]), var(&[1.0]), var(&[1.0]));
        let vars = [("w, first", &w), ("b", &b), ("c", &c)];
        let vars = vars
            .map(|(name, var)| (name.to_owned(), var.clone()))
            .to_vec();
        let sgd = Sgd::from_named_vars(vars.clone(), 0.1).unwrap();
        let clip = Clip::norm(1.0).non_finite(NonFinite::SkipStep);
        let opt = ClippedOptimizer::wrap(sgd, vars, clip).unwrap();
        let mut opt = opt.with_param_norms(true);
        let mut norms = ParamNorms::new(opt.vars().names());
        for scale in [1.0, 2.0, f64::INFINITY] {
            let towards = Tensor::new(&[3.0 * scale, 4.0 * scale], &Device::Cpu).unwrap();
            let loss = (w.as_tensor() * towards).unwrap().sum_all().unwrap();
            let nothing = (b.as_tensor() * b.zeros_like().unwrap()).unwrap();
            let nothing = nothing.sum_all().unwrap();
            norms
                .add(
                    &opt.backward_step_report(&(loss + nothing).unwrap())
                        .unwrap(),
                )
                .unwrap();
        }
        norms
    }

    #[test]
    fn norms_are_those_of_the_gradients_before_the_clip() {
        let norms = three_steps();
        let row = |norm| vec![Some(norm), Some(0.0), None];
        assert_eq!(norms.names, ["w, first", "b", "c"]);
        assert_eq!(norms.steps, [row(5.0), row(10.0), row(f64::INFINITY)]);
        let map = norms.heat_map("norms".into());
        assert_eq!(map.x, [1.0, 2.0, 3.0]);
        let row = |name: &str, norms: [Option<f64>; 3]| (name.to_owned(), norms.to_vec());
        let expected = [
            row("w, first", [5.0, 10.0, f64::INFINITY].map(Some)),
            row("b", [Some(0.0); 3]),
            row("c", [None; 3]),
        ];
        assert_eq!(map.rows, expected);
    }

    #[test]
    fn a_table_is_read_back_to_the_last_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("norms.csv");
        let mut norms = three_steps();
        norms.steps.push(vec![Some(0.1 + 0.2), None, Some(5e-324)]);
        norms.write_csv(&path).unwrap();
        assert_eq!(ParamNorms::read_csv(&path).unwrap(), norms);
        let text = std::fs::read_to_string(&path).unwrap();
        let first = "step,\"w, first\",b,c\n1,5.0,0.0,\n2,10.0,0.0,\n3,inf,0.0,\n";
        assert!(text.starts_with(first), "{text}");
        let empty = ParamNorms::new(&norms.names);
        empty.write_csv(&path).unwrap();
        assert_eq!(ParamNorms::read_csv(&path).unwrap(), empty);
        for wrong in ["step,w\n2,1\n", "step,w\n1,x\n", "step,w\n1\n"] {
            std::fs::write(&path, wrong).unwrap();
            assert!(ParamNorms::read_csv(&path).is_err(), "{wrong}");
        }
    }
}
