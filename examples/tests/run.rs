//! Runs the programs, and checks what they print.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use candle_grad_clip_log::read_metrics;

/// Cargo puts the examples beside the folder of the test's own executable.
fn program(name: &str) -> Result<PathBuf> {
    let test = env::current_exe()?;
    let profile = test.ancestors().nth(2).context("no target folder")?;
    Ok(profile
        .join("examples")
        .join(name)
        .with_extension(env::consts::EXE_EXTENSION))
}

/// The program, in a folder for its output. One thread is faster than two for such small models.
fn command(name: &str) -> Result<Command> {
    let mut command = Command::new(program(name)?);
    command
        .current_dir(env!("CARGO_TARGET_TMPDIR"))
        .env("RAYON_NUM_THREADS", "1");
    Ok(command)
}

/// Runs a program; returns what it printed, and checks that this is what its last comment says.
fn run(name: &str) -> Result<String> {
    let printed = printed(&mut command(name)?)?;
    check_comment(name, &printed)?;
    Ok(printed)
}

fn printed(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("{command:?}: `cargo test -p examples` builds it"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {stderr}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The words have to be those of the comment, and the numbers near them: other CPUs round in other
/// ways.
fn check_comment(name: &str, printed: &str) -> Result<()> {
    let path = format!("{}/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(path)?;
    let (_, comment) = source.rsplit_once("// Prints:\n").context("no comment")?;
    let comment = comment.replace("//", "");
    let (words, expected) = (printed.split_whitespace(), comment.split_whitespace());
    ensure!(
        words.clone().count() == expected.clone().count()
            && words.zip(expected).all(|(a, b)| is_near(a, b)),
        "{name} printed:\n{printed}\nits comment says:\n{comment}"
    );
    Ok(())
}

fn is_near(a: &str, b: &str) -> bool {
    let number = |word: &str| word.trim_end_matches([',', ':']).parse::<f64>();
    match (number(a), number(b)) {
        (Ok(a), Ok(b)) => (a - b).abs() <= 0.2 * b.abs(),
        _ => a == b,
    }
}

/// The numbers that follow these words.
fn numbers_after(printed: &str, words: &str) -> Result<Vec<f64>> {
    let number = |rest: &str| {
        let word = rest.split([' ', ',', '\n']).next();
        word.context("no word")?.parse().context("no number")
    };
    printed.split(words).skip(1).map(number).collect()
}

#[test]
fn wrap_names_the_untrained_vars_until_the_norm_is_mended() -> Result<()> {
    let printed = run("wrap")?;
    let cut = r#"["input.bias", "input.weight", "norm.bias", "norm.weight"]"#;
    assert!(printed.contains(&format!("missing={cut}")), "no warning");
    assert!(printed.contains(&format!("without a gradient: {cut}")));
    assert!(printed.contains("without a gradient: []"));
    let losses = numbers_after(&printed, "-> ")?;
    assert!(losses[1] < 0.2 * losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn own_loop_leaves_out_the_nan_and_survives_bad_labels_if_clipped() -> Result<()> {
    let printed = run("own_loop")?;
    assert_eq!(printed.matches("step 10 left out").count(), 4);
    let losses = numbers_after(&printed, "test loss ")?;
    assert!(1000.0 * losses[0] < losses[1], "SGD: {losses:?}");
    assert!(1000.0 * losses[2] < losses[3], "AdamW: {losses:?}");
    Ok(())
}

#[test]
fn accumulate_f16_ends_where_f32_ends() -> Result<()> {
    let printed = run("accumulate_f16")?;
    let (before, after) = (
        numbers_after(&printed, "loss ")?,
        numbers_after(&printed, "-> ")?,
    );
    assert_eq!(after[0], before[0], "f16 alone");
    assert!(after[1] < 0.5 * before[1], "f16 with help");
    assert!(
        (after[1] - after[2]).abs() < 0.001,
        "f16 and f32: {after:?}"
    );
    Ok(())
}

#[test]
fn find_limit_suggests_one_with_which_a_diverging_rate_works() -> Result<()> {
    let printed = run("find_limit")?;
    assert!(printed.contains("gradients were not finite in 11 step(s)"));
    let losses = numbers_after(&printed, "loss ")?;
    assert!(losses[1] < 0.1 * losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn weighted_transformer_trains_with_a_clip_where_it_diverges_without() -> Result<()> {
    let printed = run("weighted_transformer")?;
    assert!(printed.contains("none-0.1: gradients were not finite"));
    let losses = numbers_after(&printed, ": test loss ")?;
    let [unclipped, clipped] = losses[..] else {
        panic!("{losses:?}");
    };
    assert!(clipped < unclipped, "{losses:?}");
    let runs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("runs/weighted_transformer");
    let page = fs::read_to_string(runs.join("clipped-0.1/index.html"))?;
    assert!(page.contains("query.weight"), "no names of Vars");
    ensure!(runs.join("index.html").exists(), "no page of all runs");
    Ok(())
}

#[test]
fn resume_ends_with_the_same_bits_after_a_kill() -> Result<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("resume");
    let _ = fs::remove_dir_all(&folder);
    let (whole, killed) = (folder.join("whole"), folder.join("killed"));
    let whole = printed(command("resume")?.arg(whole))?;
    check_comment("resume", &whole)?;

    let mut child = command("resume")?
        .arg(&killed)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    while !has_checkpoint(&killed) {
        ensure!(child.try_wait()?.is_none(), "ended without a checkpoint");
        sleep(Duration::from_millis(1));
    }
    child.kill()?;
    ensure!(!child.wait()?.success(), "ended before it was killed");

    let resumed = printed(command("resume")?.arg(&killed))?;
    ensure!(!resumed.contains("starts after step 0"), "did not resume");
    assert_eq!(resumed.lines().last(), whole.lines().last());
    let rows = read_metrics(killed.join("metrics.csv"))?;
    assert!(
        rows.iter().map(|row| row.step).eq(1..=5000),
        "a step is missing or there twice"
    );
    Ok(())
}

fn has_checkpoint(folder: &Path) -> bool {
    let entries = fs::read_dir(folder.join("checkpoints"))
        .into_iter()
        .flatten();
    let mut names = entries.flatten().map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().starts_with("step-"))
}
