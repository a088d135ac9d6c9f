//! A run whose gradients are given.

use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, StepReport};
use candle_grad_clip_log::{Progress, RunLog};

/// The gradient of "w, first" is (3, 4) times a scale; that of "b" is 0; "c" has none.
pub(crate) struct MadeUp {
    w: Var,
    b: Var,
    pub(crate) opt: ClippedOptimizer<Sgd>,
}

impl MadeUp {
    pub(crate) fn new() -> Self {
        let var = |values: &[f64]| Var::new(values, &Device::Cpu).unwrap();
        let (w, b, c) = (var(&[1.0, 1.0]), var(&[1.0]), var(&[1.0]));
        let vars = [("w, first", &w), ("b", &b), ("c", &c)];
        let vars = vars.map(|(name, var)| (name.to_owned(), var.clone()));
        let sgd = Sgd::from_named_vars(vars.to_vec(), 0.1).unwrap();
        let clip: Clip = "norm:10,eps=0".parse().unwrap();
        let opt = ClippedOptimizer::wrap(sgd, vars.to_vec(), clip).unwrap();
        let opt = opt.with_param_norms(true);
        Self { w, b, opt }
    }

    pub(crate) fn without_param_norms(mut self) -> Self {
        self.opt = self.opt.with_param_norms(false);
        self
    }

    pub(crate) fn grads(&self, scale: f64) -> GradStore {
        let towards = Tensor::new(&[3.0 * scale, 4.0 * scale], &Device::Cpu).unwrap();
        let loss = (self.w.as_tensor() * towards).unwrap().sum_all().unwrap();
        let nothing = (self.b.as_tensor() * self.b.zeros_like().unwrap()).unwrap();
        let loss = (loss + nothing.sum_all().unwrap()).unwrap();
        loss.backward().unwrap()
    }

    pub(crate) fn step(&mut self, scale: f64) -> StepReport {
        let grads = self.grads(scale);
        self.opt.step_report(&grads).unwrap()
    }

    /// Logs a step for each scale; the loss is the scale.
    pub(crate) fn log(&mut self, log: &mut RunLog, scales: impl IntoIterator<Item = f64>) {
        for scale in scales {
            let report = self.step(scale);
            log.step(&report, scale).unwrap();
        }
    }
}

pub(crate) fn quiet(log: RunLog) -> RunLog {
    log.with_progress(Progress::Off)
}

pub(crate) fn create(folder: &Path) -> RunLog {
    quiet(RunLog::create(folder).unwrap())
}

pub(crate) fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

/// `metrics.csv` without its last column, which is the time.
pub(crate) fn metrics_without_time(folder: &Path) -> Vec<String> {
    let text = read(folder, "metrics.csv");
    let without_time = |line: &str| line.rsplit_once(',').unwrap().0.to_owned();
    text.lines().map(without_time).collect()
}

/// The files of a run, as [`names`] has them.
pub(crate) const FILES: [&str; 6] = [
    "events",
    "index.html",
    "metrics.csv",
    "param_norms.csv",
    "run.json",
    "scalars.csv",
];

/// The names of the files in a folder, event files without their numbers.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("events.out.tfevents.") {
            "events".to_owned()
        } else {
            name
        }
    };
    let mut names: Vec<String> = entries.map(name).collect();
    names.sort();
    names
}
