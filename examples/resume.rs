//! Training that can be killed at any time. Stop it with Ctrl-C (or `kill -9`) and start it again:
//! it resumes from its last checkpoint, and ends with the same bits as a run that was never
//! stopped.
//!
//! `cargo run --release --example resume [FOLDER]`; the folder is `runs/resume` if none is given.
//! Open `index.html` there to watch it. Remove the folder to start anew.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_grad_clip::optim::AdamW; // the moments of candle's can't be saved
use candle_grad_clip::{Checkpoints, Clip, ClippedOptimizer};
use candle_grad_clip_log::RunLog;
use candle_nn::{Activation, Module, ParamsAdamW, VarBuilder, VarMap, linear, loss, seq};
use fastrand::Rng;

const STEPS: u64 = 5000;

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or("runs/resume".to_string()));

    let mut rng = Rng::with_seed(5);
    let mut varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let model = seq()
        .add(linear(2, 64, vb.pp("input"))?)
        .add(Activation::Gelu)
        .add(linear(64, 1, vb.pp("output"))?);
    seeded::init_weights(&varmap, &mut rng)?;
    let opt = AdamW::from_named_vars(&varmap, ParamsAdamW::default())?;
    let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;

    let checkpoints = Checkpoints::in_dir(folder.join("checkpoints"))?.keep_last(3);
    let mut start = 0;
    if let Some(checkpoint) = checkpoints.load_latest(&mut varmap, &mut opt)? {
        start = checkpoint.step();
        rng = Rng::with_seed(checkpoint.state()?); // our own state: where the data goes on
    }
    println!("starts after step {start}");

    let mut log = RunLog::resume(&folder, start)?; // cuts off what was logged after that step
    log.describe(&opt)?;
    log.total_steps(STEPS);
    for step in start + 1..=STEPS {
        let (x, y) = seeded::waves(&mut rng, 64)?; // y = sin(3 a) b
        let loss = loss::mse(&model.forward(&x)?, &y)?;
        let report = opt.backward_step_report(&loss)?;
        log.step(&report, f64::from(loss.to_scalar::<f32>()?))?;
        if step % 250 == 0 {
            log.flush()?; // the log is on the disk up to the checkpoint's step
            checkpoints.save(step, &varmap, &opt, &rng.get_seed())?;
        }
    }
    log.finish()?;

    let (x, y) = seeded::waves(&mut Rng::with_seed(1), 1000)?;
    let test = loss::mse(&model.forward(&x)?, &y)?.to_scalar::<f32>()?;
    println!("test loss {test} after step {STEPS}");
    Ok(())
}

// Stopped with Ctrl-C, and started again:
// starts after step 0
// starts after step 2000
// test loss 0.001139434 after step 5000
//
// And in another folder, not stopped:
// Prints:
// starts after step 0
// test loss 0.001139434 after step 5000
