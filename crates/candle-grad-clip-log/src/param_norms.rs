//! The norms of the gradients by Var, in bounded size: bins of steps whose width doubles when there
//! are too many.

use std::collections::HashMap;

use crate::rows::ParamNormsRow;

/// When there are this many bins, neighbours are merged. The heat map has a column for each.
const MOST_BINS: usize = 200;

/// The norms of one Var in a bin or in the whole run.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Norms {
    steps: u64,
    sum_squares: f64,
    largest: f64,
}

impl Norms {
    fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.sum_squares += other.sum_squares;
        // Unlike `f64::max`, a NaN stays.
        if other.largest.is_nan() || other.largest > self.largest {
            self.largest = other.largest;
        }
    }

    /// `None` if there was no gradient.
    fn rms(self) -> Option<f64> {
        (self.steps > 0).then(|| (self.sum_squares / self.steps as f64).sqrt())
    }
}

/// Some steps in a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Bin {
    pub(crate) first_step: u64,
    pub(crate) last_step: u64,
    /// The steps that were logged.
    steps: u64,
    /// By index of the Var; Vars that came later may be missing at the end.
    vars: Vec<Norms>,
}

impl Bin {
    /// Takes in the bin that follows.
    fn merge(&mut self, next: &Self) {
        self.last_step = next.last_step;
        self.steps += next.steps;
        for (var, norms) in next.vars.iter().enumerate() {
            self.add(var, *norms);
        }
    }

    fn add(&mut self, var: usize, norms: Norms) {
        if self.vars.len() <= var {
            self.vars.resize(var + 1, Norms::default());
        }
        self.vars[var].add(norms);
    }

    pub(crate) fn rms(&self, var: usize) -> Option<f64> {
        self.vars.get(var).and_then(|norms| norms.rms())
    }
}

/// One Var over the whole run.
#[derive(Debug, Clone, Default, PartialEq)]
struct VarNorms {
    name: String,
    /// Of the finite norms.
    finite: Norms,
    /// The number of steps in a row, up to the last one, in which the gradient was exactly zero.
    zeros_in_a_row: u64,
}

/// What the run page shows of a Var.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VarSummary<'a> {
    pub(crate) name: &'a str,
    /// Of the sum of the squared norms of all Vars, 0 to 1.
    pub(crate) share: f64,
    /// Of the bins' norms.
    pub(crate) median: Option<f64>,
    /// Of the finite norms.
    pub(crate) largest: f64,
    pub(crate) zeros_in_a_row: u64,
    /// Its place in [`Bin::rms`].
    pub(crate) index: usize,
}

/// The norms of all Vars, by bins of steps.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParamNorms {
    vars: Vec<VarNorms>,
    index: HashMap<String, usize>,
    /// Closed bins, then the open one.
    bins: Vec<Bin>,
    is_last_open: bool,
    /// The steps of a full bin.
    width: u64,
}

impl Default for ParamNorms {
    fn default() -> Self {
        Self {
            vars: Vec::new(),
            index: HashMap::new(),
            bins: Vec::new(),
            is_last_open: false,
            width: 1,
        }
    }
}

impl ParamNorms {
    pub(crate) fn is_empty(&self) -> bool {
        self.bins.is_empty()
    }

    pub(crate) fn bins(&self) -> &[Bin] {
        &self.bins
    }

    /// The steps that were added.
    pub(crate) fn steps(&self) -> u64 {
        self.bins.iter().map(|bin| bin.steps).sum()
    }

    /// The steps of a full bin.
    pub(crate) fn width(&self) -> u64 {
        self.width
    }

    /// Adds a step: each Var's norm, `None` without a gradient. Returns the rows of the bin that it
    /// filled.
    pub(crate) fn add<'a>(
        &mut self,
        step: u64,
        norms: impl IntoIterator<Item = (&'a str, Option<f64>)>,
    ) -> Vec<ParamNormsRow> {
        if !self.is_last_open {
            self.make_room();
            self.bins.push(Bin {
                first_step: step,
                ..Bin::default()
            });
            self.is_last_open = true;
        }
        // Nearly always the same Vars in the same order: then there is nothing to look up.
        for (place, (name, norm)) in norms.into_iter().enumerate() {
            let var = match self.vars.get(place) {
                Some(var) if var.name == name => place,
                _ => self.index_of(name),
            };
            let Some(norm) = norm else {
                self.vars[var].zeros_in_a_row = 0;
                continue;
            };
            let norms = Norms {
                steps: 1,
                sum_squares: norm * norm,
                largest: norm,
            };
            self.vars[var].add(norms, norm == 0.0);
            if let Some(open) = self.bins.last_mut() {
                open.add(var, norms);
            }
        }
        let Some(open) = self.bins.last_mut() else {
            return Vec::new();
        };
        open.last_step = step;
        open.steps += 1;
        if open.steps < self.width {
            return Vec::new();
        }
        self.close()
    }

    /// Closes the open bin and returns its rows. Nothing if there is none.
    pub(crate) fn close(&mut self) -> Vec<ParamNormsRow> {
        if !std::mem::take(&mut self.is_last_open) {
            return Vec::new();
        }
        let rows = |bin: &Bin| {
            let with_grad = bin.vars.iter().zip(&self.vars);
            let row = |(norms, var): (&Norms, &VarNorms)| {
                let rms = norms.rms()?;
                Some(ParamNormsRow {
                    first_step: bin.first_step,
                    last_step: bin.last_step,
                    name: var.name.clone(),
                    steps: norms.steps,
                    rms,
                    largest: norms.largest,
                })
            };
            with_grad.filter_map(row).collect()
        };
        self.bins.last().map(rows).unwrap_or_default()
    }

    /// Takes in a row of an earlier process, in the order of the file.
    pub(crate) fn restore(&mut self, row: &ParamNormsRow) {
        let is_same =
            |bin: &Bin| (bin.first_step, bin.last_step) == (row.first_step, row.last_step);
        if !self.bins.last().is_some_and(is_same) {
            self.make_room();
            self.bins.push(Bin {
                first_step: row.first_step,
                last_step: row.last_step,
                ..Bin::default()
            });
        }
        let var = self.index_of(&row.name);
        let norms = Norms {
            steps: row.steps,
            sum_squares: row.rms * row.rms * row.steps as f64,
            largest: row.largest,
        };
        self.vars[var].add(norms, row.largest == 0.0);
        if let Some(bin) = self.bins.last_mut() {
            bin.steps = bin.steps.max(row.steps);
            bin.add(var, norms);
            self.width = self.width.max(bin.steps);
        }
    }

    /// The Vars, the largest share of the norm first.
    pub(crate) fn summaries(&self) -> Vec<VarSummary<'_>> {
        let total: f64 = self.vars.iter().map(|var| var.finite.sum_squares).sum();
        let share = |norms: Norms| {
            if total > 0.0 {
                norms.sum_squares / total
            } else {
                0.0
            }
        };
        let mut summaries = Vec::with_capacity(self.vars.len());
        for (index, var) in self.vars.iter().enumerate() {
            let in_bins = self.bins.iter().filter_map(|bin| bin.rms(index));
            let mut in_bins: Vec<f64> = in_bins.collect();
            in_bins.sort_by(f64::total_cmp);
            summaries.push(VarSummary {
                name: &var.name,
                share: share(var.finite),
                median: in_bins.get(in_bins.len() / 2).copied(),
                largest: var.finite.largest,
                zeros_in_a_row: var.zeros_in_a_row,
                index,
            });
        }
        summaries.sort_by(|a, b| b.share.total_cmp(&a.share));
        summaries
    }

    /// Merges neighbours if there are too many bins.
    fn make_room(&mut self) {
        if self.bins.len() < MOST_BINS {
            return;
        }
        let merge = |pair: &[Bin]| {
            let mut merged = pair[0].clone();
            pair[1..].iter().for_each(|next| merged.merge(next));
            merged
        };
        self.bins = self.bins.chunks(2).map(merge).collect();
        self.width *= 2;
    }

    fn index_of(&mut self, name: &str) -> usize {
        if let Some(index) = self.index.get(name) {
            return *index;
        }
        self.vars.push(VarNorms {
            name: name.to_owned(),
            ..VarNorms::default()
        });
        self.index.insert(name.to_owned(), self.vars.len() - 1);
        self.vars.len() - 1
    }
}

impl VarNorms {
    fn add(&mut self, norms: Norms, all_zero: bool) {
        if norms.sum_squares.is_finite() {
            self.finite.add(norms);
        }
        self.zeros_in_a_row = if all_zero {
            self.zeros_in_a_row + norms.steps
        } else {
            0
        };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn add(norms: &mut ParamNorms, step: u64, a: f64, b: Option<f64>) -> Vec<ParamNormsRow> {
        norms.add(step, [("a", Some(a)), ("b", b)])
    }

    #[test]
    fn each_step_is_a_bin_while_there_are_few() {
        let mut norms = ParamNorms::default();
        let rows = add(&mut norms, 1, 3.0, Some(4.0));
        let row = |name: &str, norm| ParamNormsRow {
            first_step: 1,
            last_step: 1,
            name: name.into(),
            steps: 1,
            rms: norm,
            largest: norm,
        };
        assert_eq!(rows, [row("a", 3.0), row("b", 4.0)]);
        assert_eq!(add(&mut norms, 2, 3.0, None).len(), 1);
        let summaries = norms.summaries();
        let shares: Vec<_> = summaries.iter().map(|var| (var.name, var.share)).collect();
        // 2 times 9 of 34; 16 of 34.
        assert_eq!(shares, [("a", 18.0 / 34.0), ("b", 16.0 / 34.0)]);
        assert_eq!(norms.bins()[1].rms(1), None);
    }

    #[test]
    fn many_steps_take_few_rows_and_few_bins() {
        let mut norms = ParamNorms::default();
        let mut rows = Vec::new();
        for step in 1..=100_000 {
            rows.extend(add(&mut norms, step, step as f64, Some(0.0)));
        }
        rows.extend(norms.close());
        assert!(norms.bins().len() <= MOST_BINS);
        let bins = rows.len() / 2;
        assert!((1000..=1200).contains(&bins), "{bins}"); // 200 + 100 log2(100,000 / 200)
        assert_eq!(norms.bins().last().unwrap().last_step, 100_000);
        let steps: u64 = norms.bins().iter().map(|bin| bin.steps).sum();
        assert_eq!(steps, 100_000);
        let summaries = norms.summaries();
        assert_eq!((summaries[0].name, summaries[0].share), ("a", 1.0));
        assert_eq!(summaries[0].largest, 100_000.0);
        assert_eq!(summaries[1].zeros_in_a_row, 100_000);

        // Read back, it goes on as before.
        let mut restored = ParamNorms::default();
        for row in &rows {
            restored.restore(row);
        }
        assert_eq!(restored.width(), norms.width());
        let again = restored.summaries();
        assert_eq!(again[1].zeros_in_a_row, 100_000);
        let nearly = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b;
        assert!(nearly(again[0].largest, summaries[0].largest));
        assert!(restored.bins().len() <= MOST_BINS);
        let steps: u64 = restored.bins().iter().map(|bin| bin.steps).sum();
        assert_eq!(steps, 100_000);
    }

    #[test]
    fn non_finite_norms_are_kept_and_do_not_spoil_the_shares() {
        let mut norms = ParamNorms::default();
        add(&mut norms, 1, f64::NAN, Some(1.0));
        add(&mut norms, 2, 1.0, Some(f64::INFINITY));
        let summaries = norms.summaries();
        assert_eq!([summaries[0].share, summaries[1].share], [0.5, 0.5]);
        // One bad step does not hide the others.
        assert_eq!([summaries[0].largest, summaries[1].largest], [1.0, 1.0]);
        assert!(norms.bins()[0].rms(0).unwrap().is_nan());
        assert_eq!(norms.bins()[1].rms(1), Some(f64::INFINITY));
    }
}
