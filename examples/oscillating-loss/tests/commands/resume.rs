//! A run that was killed, at whatever moment, ends with the results of one that was not. The
//! library's own tests cover the files of a checkpoint.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use candle_grad_clip::{Checkpoints, Clip};
use clap::Parser;
use oscillating_loss::cli::{self, Cli};
use oscillating_loss::data::Weather;
use oscillating_loss::saves::Saves;
use oscillating_loss::settings::{DeviceKind, Settings};
use oscillating_loss::source::Source;
use oscillating_loss::train::{Extras, train};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde_json::Value;
use tempfile::TempDir;

const KILLS: usize = 20;
const STEPS: usize = 60;
const RUN: [&str; 6] = [
    "train",
    "--steps=60",
    "--batch=2",
    "--eval-every=25",
    "--save-every=2",
    "--seed=5",
];
const SGD: [&str; 2] = ["--optimizer=sgd", "--momentum=0.9"];
const ADAMW: [&str; 2] = ["--optimizer=adamw", "--clip=value:0.1"];

fn spawn(args: &[&str], out: &Path, resume: bool) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oscillating-loss"));
    if resume {
        command.args(["train", "--resume"]).arg(out);
    } else {
        command.args(RUN).args(args).arg("--out").arg(out);
    }
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// What it printed; it must not fail.
fn finish(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn call(args: &[&str], option: &str, folder: &Path) -> anyhow::Result<()> {
    let folder = folder.to_str().unwrap();
    let args = ["oscillating-loss", "train"].iter().chain(args).copied();
    let args = args.chain([option, folder]);
    cli::run(&Cli::try_parse_from(args)?, &AtomicBool::new(false))
}

/// The steps of the latest checkpoint; none before the first.
pub(crate) fn latest(out: &Path) -> Option<u64> {
    let folder = out.join("checkpoints");
    if !folder.exists() {
        return None;
    }
    let checkpoints = Checkpoints::in_dir(folder).unwrap();
    checkpoints.latest().unwrap().map(|found| found.step())
}

/// The results of a run, without the times in them.
fn results(out: &Path) -> BTreeMap<String, String> {
    let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
    let mut summary: Value = serde_json::from_str(&read("summary.json")).unwrap();
    let run = summary["arms"][0].as_object_mut().unwrap();
    run.remove("ms_per_step").unwrap();
    let arm = run["arm"].as_str().unwrap().replace(':', "-");
    let weights = fs::read(out.join(&arm).join("weights.safetensors")).unwrap();
    let log = read(&format!("{arm}/metrics.csv"));
    let mut lines = log.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let time = header.iter().position(|name| *name == "seconds").unwrap();
    let log: Vec<String> = lines
        .map(|mut fields| {
            fields.remove(time);
            fields.join(",")
        })
        .collect();
    [
        ("config.json", read("config.json")),
        ("metrics.csv", read("metrics.csv")),
        ("summary.json", summary.to_string()),
        ("weights.safetensors", format!("{weights:?}")),
        ("metrics.csv of the log", log.join("\n")),
    ]
    .map(|(name, text)| (name.to_owned(), text))
    .into()
}

fn assert_same(ours: &Path, expected: &Path) {
    let ours = results(ours);
    for (name, text) in results(expected) {
        assert!(ours[&name] == text, "{name} is not the same");
    }
}

/// Waits for a random moment near a step; false if the run ended before it.
fn wait_for_moment(child: &mut Child, out: &Path, step: usize, rng: &mut Pcg64) -> bool {
    let micros = |most: u64, rng: &mut Pcg64| Duration::from_micros(rng.random_range(0..most));
    if rng.random_range(0..4) == 0 {
        // In the beginning: data, folder, the checkpoint to resume from.
        sleep(micros(200_000, rng));
        return child.try_wait().unwrap().is_none();
    }
    while latest(out).is_none_or(|newest| newest < step.min(STEPS) as u64) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        sleep(Duration::from_micros(300));
    }
    sleep(micros(30_000, rng));
    child.try_wait().unwrap().is_none()
}

fn survives_kills(args: &[&str], seed: u64) {
    let undisturbed = TempDir::new().unwrap();
    finish(spawn(args, undisturbed.path(), false));

    let mut rng = Pcg64::seed_from_u64(seed);
    let mut folder = TempDir::new().unwrap();
    let (mut kills, mut steps) = (0, Vec::new());
    while kills < KILLS {
        let out = folder.path();
        let step = STEPS * (kills % KILLS + 1) / KILLS;
        let mut child = spawn(args, out, latest(out).is_some());
        if wait_for_moment(&mut child, out, step, &mut rng) {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            steps.push(latest(out));
        } else {
            // It was faster than we are.
            finish(child);
            assert_same(out, undisturbed.path());
            folder = TempDir::new().unwrap();
        }
    }
    println!("{kills} kills; last checkpoints {steps:?}");
    let out = folder.path();
    finish(spawn(args, out, latest(out).is_some()));
    assert_same(out, undisturbed.path());
}

#[test]
fn sgd_with_momentum_survives_kills() {
    survives_kills(&SGD, 1);
}

#[test]
fn adamw_survives_kills() {
    survives_kills(&ADAMW, 2);
}

const SHORT: [&str; 3] = ["--batch=2", "--eval-every=4", "--save-every=4"];

/// A run of six steps, of which step 6 has the last checkpoint.
fn short_run(args: &[&str]) -> TempDir {
    let folder = TempDir::new().unwrap();
    let args = [&SHORT, args, &["--steps=6"]].concat();
    call(&args, "--out", folder.path()).unwrap();
    folder
}

fn resume_error(args: &[&str], folder: &Path) -> String {
    format!("{:#}", call(args, "--resume", folder).unwrap_err())
}

#[test]
fn a_finished_run_says_so_and_keeps_its_results() {
    let folder = short_run(&[]);
    let before = results(folder.path());
    let text = finish(spawn(&[], folder.path(), true));
    let expected = "This run is finished: all 6 steps are done.";
    assert!(text.starts_with(expected), "{text}");
    assert!(results(folder.path()) == before);
}

#[test]
fn more_steps_make_the_results_of_a_longer_run() {
    let rules = [
        "auto:50",
        "quantile:0.5,rate=0.5",
        "zclip:z_thresh=0.1,warmup=2",
        "adagc:warmup=2",
        "skip:z=0.1,window=5",
    ];
    let rules = rules.map(|rule| vec!["--clip", rule]);
    for args in [SGD.to_vec(), ADAMW.to_vec()].into_iter().chain(rules) {
        let folder = short_run(&args);
        call(&["--steps=13"], "--resume", folder.path()).unwrap();
        let longer = TempDir::new().unwrap();
        let longer_args = [&SHORT[..], &args, &["--steps=13"]].concat();
        call(&longer_args, "--out", longer.path()).unwrap();
        // The evaluation at step 6 was only for being the last.
        assert_same(folder.path(), longer.path());
        // Or the history of a rule would have changed nothing.
        let steps = fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        let acted = |line: &str| line.ends_with("1,0") || line.ends_with("0,1");
        assert!(steps.lines().skip(7).any(acted), "{args:?}: {steps}");
    }
}

#[test]
fn an_interrupted_run_leaves_a_checkpoint_to_go_on_from() {
    let settings = Settings {
        arm: Clip::norm(1.0).into(),
        momentum: 0.9,
        batch: 2,
        steps: 10,
        eval_every: 100,
        ..Settings::default()
    };
    let weather = Weather::embedded().unwrap();
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let source = Source::new(DeviceKind::Cpu, None).unwrap();
    let saves = Saves::begin(out, 100, source).unwrap();
    let with = |saves| Extras {
        saves: Some(saves),
        ..Extras::default()
    };
    let flag = AtomicBool::new(false);
    let part = train(&settings, &weather, &flag, with(&saves), |step, _| {
        flag.store(step.step == 5, Ordering::Relaxed);
        Ok(())
    });
    let part = part.unwrap();
    assert!(part.interrupted);

    let (resumed, saves) = Saves::resume(out, None).unwrap();
    assert_eq!((&resumed, saves.resumed()), (&settings, Some(5)));
    let mut seen = Vec::new();
    let flag = AtomicBool::new(false);
    let extras = Extras {
        before: part.steps,
        ..with(&saves)
    };
    let rest = train(&settings, &weather, &flag, extras, |step, _| {
        seen.push(step.step);
        Ok(())
    });
    assert_eq!(seen, [6, 7, 8, 9, 10]);
    let whole = train(&settings, &weather, &flag, Extras::default(), |_, _| Ok(()));
    let [rest, whole] = [rest, whole].map(|run| format!("{:?}", run.unwrap().steps));
    assert_eq!(rest, whole);
}

#[test]
fn other_options_do_not_go_with_resume() {
    let folder = short_run(&["--momentum=0.5"]);
    for option in [
        "--lr=0.003",
        "--clip=none",
        "--optimizer=adamw",
        "--momentum=0",
        "--power=3",
        "--alpha=3",
        "--batch=3",
        "--eval-every=5",
        "--seed=1",
        "--non-finite=zero",
        "--out=b",
    ] {
        let args = ["oscillating-loss", "train", "--resume=a", option];
        assert!(Cli::try_parse_from(args).is_err(), "{option}");
    }
    let error = resume_error(&["--steps=5"], folder.path());
    let expected = "--steps 5: the run to resume has 6";
    assert!(error.starts_with(expected), "{error}");
    call(&["--steps=6", "--save-every=9"], "--resume", folder.path()).unwrap();
}

#[test]
fn no_checkpoint_is_a_clear_error() {
    let folder = TempDir::new().unwrap();
    for out in [folder.path(), &folder.path().join("none")] {
        let error = resume_error(&[], out);
        assert!(error.contains("no checkpoint in"), "{error}");
        assert!(!out.join("checkpoints").exists());
    }
}

#[test]
fn a_new_run_removes_the_checkpoints_of_the_one_before() {
    let folder = short_run(&[]);
    assert_eq!(latest(folder.path()), Some(6));
    let args = [&SHORT[..], &["--steps=2"]].concat();
    call(&args, "--out", folder.path()).unwrap();
    assert_eq!(latest(folder.path()), Some(2));
}

#[test]
fn other_data_than_the_run_had_are_refused() {
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("days.csv");
    let rows = (0..140).map(|day| format!("{day},{}\n", day % 7));
    let text: String = std::iter::once("day,temp\n".to_owned())
        .chain(rows)
        .collect();
    fs::write(&data, &text).unwrap();
    let out = folder.path().join("out");
    let args = [&SHORT[..], &["--steps=2", "--target=temp"]].concat();
    let data_arg = format!("--data={}", data.display());
    let args = [&args[..], &[&data_arg]].concat();
    call(&args, "--out", &out).unwrap();
    call(&["--steps=4"], "--resume", &out).unwrap();

    fs::write(&data, text.replace("139,6", "139,5")).unwrap();
    let error = resume_error(&[], &out);
    assert!(
        error.contains("has changed since this run began"),
        "{error}"
    );
    fs::remove_file(&data).unwrap();
    let error = resume_error(&[], &out);
    assert!(error.contains("can't read"), "{error}");
}
