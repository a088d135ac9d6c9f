//! What `RunLog::step` adds to a training step: with and without the norms of 59 Vars.
#![allow(missing_docs)] // criterion's macros make public items without any.

use candle_core::{DType, Device, Var};
use candle_grad_clip::optim::Sgd;
use candle_grad_clip::{Clip, ClippedOptimizer, StepReport};
use candle_grad_clip_log::{Progress, RunLog, read_metrics};
use criterion::{Criterion, criterion_group, criterion_main};

/// As many Vars as the model of candle's llama2-c training.
const VARS: usize = 59;

fn step(c: &mut Criterion) {
    try_step(c).expect("a folder for temporary files can be written");
}

fn try_step(c: &mut Criterion) -> Result<(), Box<dyn std::error::Error>> {
    let name = format!("candle-grad-clip-bench-log-{}", std::process::id());
    let root = std::env::temp_dir().join(name);
    let mut group = c.benchmark_group("RunLog");
    for with_param_norms in [false, true] {
        let mut vars = Vec::new();
        for at in 0..VARS {
            vars.push((
                format!("layers.{at}.weight"),
                Var::ones(8, DType::F32, &Device::Cpu)?,
            ));
        }
        let sgd = Sgd::from_named_vars(vars.clone(), 1e-6)?;
        let opt = ClippedOptimizer::wrap(sgd, vars.clone(), Clip::norm(1.0))?;
        let mut opt = opt.with_param_norms(with_param_norms);
        let mut loss = vars[0].1.sqr()?.sum_all()?;
        for (_, var) in &vars[1..] {
            loss = (loss + var.sqr()?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        let norms = if with_param_norms {
            "with norms by Var"
        } else {
            "norm only"
        };
        group.bench_function(format!("training step, {norms}"), |b| {
            b.iter(|| opt.step_report(&grads).expect("finite gradients"));
        });
        let log = RunLog::create(root.join(norms))?;
        let mut log = log.with_progress(Progress::Off).with_strict(true);
        log.describe(&opt)?;
        group.bench_function(format!("training step and log, {norms}"), |b| {
            b.iter(|| {
                let report = opt.step_report(&grads).expect("finite gradients");
                log.step(&report, 1.0).expect("the files can be written");
            });
        });
        log.finish()?;
        let rows = read_metrics(root.join(norms).join("metrics.csv"))?;
        assert_eq!(
            rows.last().map(|row| row.step),
            opt.last_report().map(StepReport::step)
        );
    }
    group.finish();
    std::fs::remove_dir_all(&root)?;
    Ok(())
}

criterion_group!(benches, step);
criterion_main!(benches);
