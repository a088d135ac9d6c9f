//! Checkpoints of a whole run: `load_latest` goes on bit for bit, from a whole checkpoint, whatever
//! happened to the others.

mod damage;
mod folders;
mod kept;
mod kills;
mod mismatch;
mod other_optimizers;
mod resume;
mod state;
mod writers;

use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Checkpoints, Clip, ClippedOptimizer};
use candle_nn::{Optimizer, ParamsAdamW, VarMap};
use support::device::device;

/// A map of Vars of ones, by name, shape and dtype.
fn map_of(vars: &[(&str, &[usize], DType)]) -> Result<VarMap> {
    let map = VarMap::new();
    for (name, shape, dtype) in vars {
        let var = Var::ones(*shape, *dtype, device())?;
        map.data().lock().unwrap().insert((*name).to_string(), var);
    }
    Ok(map)
}

/// A small model, its optimizer, and where its checkpoints are.
struct Run {
    map: VarMap,
    opt: ClippedOptimizer<AdamW>,
    checkpoints: Checkpoints,
}

impl Run {
    fn new(dir: &Path) -> Result<Self> {
        Self::of(
            dir,
            &[
                ("a.weight", &[2, 3], DType::F32),
                ("b.bias", &[4], DType::F64),
            ],
        )
    }

    fn of(dir: &Path, vars: &[(&str, &[usize], DType)]) -> Result<Self> {
        let map = map_of(vars)?;
        let opt = AdamW::from_named_vars(
            &map,
            ParamsAdamW {
                lr: 0.1,
                ..Default::default()
            },
        )?;
        Ok(Self {
            opt: ClippedOptimizer::wrap(opt, &map, Clip::norm(1.0))?,
            map,
            checkpoints: Checkpoints::in_dir(dir)?,
        })
    }

    /// Takes a step, after which the weights are others.
    fn step(&mut self) -> Result<()> {
        let mut loss = None;
        for var in self.map.all_vars() {
            let term = var.sqr()?.sum_all()?.to_dtype(DType::F64)?;
            loss = Some(match loss {
                Some(loss) => (loss + term)?,
                None => term,
            });
        }
        Ok(self.opt.backward_step(&loss.unwrap())?)
    }

    /// Takes steps, and saves a checkpoint after each.
    fn steps(&mut self, steps: std::ops::RangeInclusive<u64>) -> Result<()> {
        for step in steps {
            self.step()?;
            self.checkpoints.save(step, &self.map, &self.opt, &step)?;
        }
        Ok(())
    }

    /// The step that was loaded.
    fn load_latest(&mut self) -> candle_grad_clip::Result<Option<u64>> {
        let latest = self.checkpoints.load_latest(&mut self.map, &mut self.opt)?;
        Ok(latest.map(|checkpoint| checkpoint.step()))
    }

    /// Bits of the weights, by name, and the counters.
    fn everything(&self) -> Result<(Vec<Vec<u64>>, u64)> {
        let bits = support::gradients::bits_of_vars(self.opt.vars().vars())?;
        Ok((bits, self.opt.inner().steps()))
    }
}

/// A run that has saved checkpoints after these many steps.
fn run_of(dir: &Path, steps: u64) -> Result<Run> {
    let mut run = Run::new(dir)?;
    run.steps(1..=steps)?;
    Ok(run)
}

/// The lines of the docs compile as they stand, for both kinds of references.
#[test]
fn load_latest_is_three_lines() -> Result<()> {
    let folder = support::checkpoints::Folder::new()?;
    let Run {
        map: mut varmap,
        mut opt,
        ..
    } = Run::new(&folder)?;
    let (step, state) = (7, "anything");

    let checkpoints = Checkpoints::in_dir(folder.join("runs/mine"))?
        .keep_last(3)
        .keep_best(1);
    let start = match checkpoints.load_latest(&mut varmap, &mut opt)? {
        Some(c) => c.step(),
        None => 0,
    };
    checkpoints.save(step, &varmap, &opt, &state)?;

    assert_eq!(start, 0);
    let vars = opt.vars().clone();
    let loaded = checkpoints.load_latest(vars, &mut opt)?.unwrap();
    assert_eq!((loaded.step(), loaded.loss()), (7, None));
    assert_eq!(loaded.state::<String>()?, "anything");
    assert_eq!(loaded.path(), folder.join("runs/mine/step-000007"));
    checkpoints.save_with_loss(8, 0.5, &mut varmap, &opt, &state)?;
    let latest = checkpoints.load_latest(&varmap, &mut opt)?.unwrap();
    assert_eq!((latest.step(), latest.loss()), (8, Some(0.5)));
    Ok(())
}
