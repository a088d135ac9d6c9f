//! Which checkpoints are kept.

use anyhow::Result;
use candle_grad_clip::{Checkpoint, Checkpoints};
use support::checkpoints::Folder;

use super::Run;

/// The steps of the checkpoints that are left of these losses, the first that of step 1.
fn kept(keep: impl Fn(Checkpoints) -> Checkpoints, losses: &[f64]) -> Result<Vec<u64>> {
    let folder = Folder::in_memory()?;
    let run = Run::new(&folder)?;
    let checkpoints = keep(run.checkpoints);
    for (step, loss) in (1..).zip(losses) {
        let path = checkpoints.save_with_loss(step, *loss, &run.map, &run.opt, &())?;
        // A new one is always there.
        assert_eq!(
            checkpoints
                .latest()?
                .map(|latest| latest.path().to_path_buf()),
            Some(path)
        );
    }
    let all = checkpoints.list()?;
    let best = checkpoints.best()?.and_then(|best| best.loss());
    let losses = all.iter().filter_map(Checkpoint::loss);
    assert_eq!(best, losses.reduce(f64::min));
    Ok(all.iter().map(Checkpoint::step).collect())
}

#[test]
fn the_last_and_the_best_are_kept() -> Result<()> {
    let losses = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0];
    assert_eq!(kept(|all| all, &losses)?, [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(|all| all.keep_last(2), &losses)?, [5, 6]);
    assert_eq!(kept(|all| all.keep_last(0), &losses)?, [6]);
    assert_eq!(kept(|all| all.keep_last(100), &losses)?, [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(|all| all.keep_best(1), &losses)?, [2, 6]);
    assert_eq!(kept(|all| all.keep_best(2), &losses)?, [2, 4, 6]);
    assert_eq!(
        kept(|all| all.keep_last(2).keep_best(2), &losses)?,
        [2, 4, 5, 6]
    );
    assert_eq!(
        kept(|all| all.keep_last(2).keep_best(1), &[3.0, 2.0, 1.0])?,
        [2, 3]
    );
    // Of equal ones the newer.
    assert_eq!(kept(|all| all.keep_best(1), &[1.0, 1.0, 2.0])?, [2, 3]);
    // NaN and infinity are never the best.
    let losses = [f64::NAN, f64::NEG_INFINITY, 7.0, f64::INFINITY, 8.0];
    assert_eq!(kept(|all| all.keep_best(1), &losses)?, [3, 5]);
    assert_eq!(kept(|all| all.keep_best(1), &[f64::NAN; 3])?, [3]);
    Ok(())
}

#[test]
fn load_latest_takes_the_later_save_of_a_step() -> Result<()> {
    let folder = Folder::in_memory()?;
    let mut run = Run::new(&folder)?;
    run.steps(1..=2)?;
    run.step()?;
    let path = run.checkpoints.save(2, &run.map, &run.opt, &"later")?;
    assert_eq!(path, folder.join("step-000002-2"));
    let latest = run
        .checkpoints
        .load_latest(&run.map, &mut run.opt)?
        .unwrap();
    assert_eq!(latest.state::<String>()?, "later");
    // By default nothing is removed. Otherwise the later one replaces the one before, which counts
    // no more.
    assert_eq!(run.checkpoints.list()?.len(), 3);
    let checkpoints = run.checkpoints.keep_last(2);
    let path = checkpoints.save(2, &run.map, &run.opt, &"last")?;
    assert_eq!(path, folder.join("step-000002-3"));
    let steps: Vec<u64> = checkpoints.list()?.iter().map(Checkpoint::step).collect();
    assert_eq!(steps, [1, 2]);
    assert_eq!(checkpoints.latest()?.unwrap().state::<String>()?, "last");
    Ok(())
}
