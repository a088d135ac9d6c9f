//! Checkpoints: a run that was killed, at whatever moment, ends with the files of one that was not.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use candle_grad_clip::Clip;
use clap::Parser;
use oscillating_loss::checkpoint::{Checkpoint, Checkpoints};
use oscillating_loss::cli::{self, Cli};
use oscillating_loss::data::Weather;
use oscillating_loss::ours;
use oscillating_loss::settings::{DeviceKind, Settings};
use oscillating_loss::source::Source;
use oscillating_loss::train::{Extras, train, train_with};
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

fn checkpoints(out: &Path) -> Vec<(usize, PathBuf)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(out).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if let Some(step) = name.strip_prefix("checkpoint-") {
            found.push((step.parse().unwrap(), entry.path()));
        }
    }
    found.sort();
    found
}

/// All files below a folder, without the times in them.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            let below = contents(&path).into_iter();
            all.extend(below.map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let (name, bytes) = match name {
            "summary.json" => (name, without(&bytes, "/arms/0", "ms_per_step")),
            "state.json" => (name, without(&bytes, "", "training_time")),
            "crc32c.json" => (name, without(&bytes, "", "state.json")),
            _ if name.starts_with("events.out.") => ("events.out", without_wall_times(&bytes)),
            _ => (name, bytes),
        };
        assert_eq!(all.insert(name.to_owned(), bytes), None, "two {name}");
    }
    all
}

fn without(json: &[u8], pointer: &str, key: &str) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(json).unwrap();
    let object = value.pointer_mut(pointer).unwrap().as_object_mut().unwrap();
    object.remove(key).unwrap();
    value.to_string().into_bytes()
}

/// The events of a `TensorBoard` file; each record is 8 bytes of length, 4 of checksum, the event,
/// 4 of checksum, and an event begins with a tag and the 8 bytes of its time.
fn without_wall_times(mut records: &[u8]) -> Vec<u8> {
    let mut events = Vec::new();
    while let Some((length, rest)) = records.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap();
        let event = &rest[4..4 + length];
        assert_eq!(event[0], 0x09);
        events.extend(&event[9..]);
        records = &rest[4 + length + 4..];
    }
    events
}

fn assert_same(ours: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    let names = |all: &BTreeMap<String, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(expected));
    for (name, bytes) in expected {
        assert!(&ours[name] == bytes, "{name} is not the same");
    }
}

/// Waits for a random moment near a step; false if the run ended before it.
fn wait_for_moment(child: &mut Child, out: &Path, step: usize, rng: &mut Pcg64) -> bool {
    let which = rng.random_range(0..4);
    let micros = |most: u64, rng: &mut Pcg64| Duration::from_micros(rng.random_range(0..most));
    if which == 0 {
        // In the beginning: data, folder, the checkpoint to go on from.
        sleep(micros(200_000, rng));
        return child.try_wait().unwrap().is_none();
    }
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let newest = checkpoints(out).last().map(|(step, _)| *step);
        if newest.is_some_and(|newest| newest >= step.min(STEPS)) {
            break;
        }
        sleep(Duration::from_micros(300));
    }
    if which == 1 {
        // During a save; at the last steps, in what comes after.
        for _ in 0..100 {
            if out.join("checkpoint.tmp").exists() {
                break;
            }
            sleep(Duration::from_micros(100));
        }
        sleep(micros(2_000, rng));
    } else {
        sleep(micros(30_000, rng));
    }
    child.try_wait().unwrap().is_none()
}

fn survives_kills(args: &[&str], seed: u64) {
    let undisturbed = TempDir::new().unwrap();
    finish(spawn(args, undisturbed.path(), false));
    let expected = contents(undisturbed.path());

    let mut rng = Pcg64::seed_from_u64(seed);
    let mut folder = TempDir::new().unwrap();
    let (mut kills, mut in_saves, mut steps) = (0, 0, Vec::new());
    while kills < KILLS || in_saves == 0 {
        let out = folder.path();
        let step = STEPS * (kills % KILLS + 1) / KILLS;
        let mut child = spawn(args, out, !checkpoints(out).is_empty());
        if wait_for_moment(&mut child, out, step, &mut rng) {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            in_saves += usize::from(out.join("checkpoint.tmp").exists());
            steps.push(checkpoints(out).last().map(|(step, _)| *step));
        } else {
            // It was faster than we are.
            finish(child);
            assert_same(&contents(out), &expected);
            folder = TempDir::new().unwrap();
        }
    }
    println!("{kills} kills, {in_saves} of them during a save; last checkpoints {steps:?}");
    let out = folder.path();
    finish(spawn(args, out, !checkpoints(out).is_empty()));
    assert_same(&contents(out), &expected);
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
fn a_finished_run_says_so_and_keeps_its_files() {
    let folder = short_run(&[]);
    let before = contents(folder.path());
    let text = finish(spawn(&[], folder.path(), true));
    assert!(
        text.starts_with("This run is finished: all 6 steps are done."),
        "{text}"
    );
    assert_same(&contents(folder.path()), &before);
}

#[test]
fn more_steps_make_the_files_of_a_longer_run() {
    for optimizer in [SGD, ADAMW] {
        let folder = short_run(&optimizer);
        call(&["--steps=13"], "--resume", folder.path()).unwrap();
        let longer = TempDir::new().unwrap();
        let args = [&SHORT[..], &optimizer, &["--steps=13"]].concat();
        call(&args, "--out", longer.path()).unwrap();
        // The evaluation at step 6 was only for being the last.
        assert_same(&contents(folder.path()), &contents(longer.path()));
    }
}

#[test]
fn the_history_of_a_rule_goes_on() {
    let rules = [
        "auto:50",
        "quantile:0.5,rate=0.5",
        "zclip:z_thresh=0.1,warmup=2",
        "adagc:warmup=2",
        "skip:z=0.1,window=5",
    ];
    for rule in rules {
        let clip = ["--clip", rule];
        let folder = short_run(&clip);
        call(&["--steps=13"], "--resume", folder.path()).unwrap();
        let longer = TempDir::new().unwrap();
        let args = [&SHORT[..], &clip, &["--steps=13"]].concat();
        call(&args, "--out", longer.path()).unwrap();
        assert_same(&contents(folder.path()), &contents(longer.path()));
        // Or the history would have changed nothing.
        let steps = fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
        let acted = |line: &str| line.ends_with("1,0") || line.ends_with("0,1");
        assert!(steps.lines().skip(7).any(acted), "{rule}: {steps}");
    }
}

#[test]
fn an_arm_may_be_written_in_another_way_on_resuming() {
    let folder = short_run(&["--clip=norm:1.0"]);
    call(&["--clip=norm:max_norm=1"], "--resume", folder.path()).unwrap();
    let error = resume_error(&["--clip=auto"], folder.path());
    let expected = "--clip auto contradicts the run to resume, which has norm:1.0";
    assert!(error.contains(expected), "{error}");
}

fn extras(checkpoints: &Checkpoints) -> Extras<'_> {
    Extras {
        checkpoints: Some(checkpoints),
        ..Extras::default()
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
    let mut checkpoints = Checkpoints {
        out: folder.path().to_owned(),
        save_every: 100,
        source: Source::new(DeviceKind::Cpu, None).unwrap(),
        resumed: None,
    };
    let flag = AtomicBool::new(false);
    let part = train_with(
        &settings,
        &weather,
        &flag,
        extras(&checkpoints),
        |step, _| {
            flag.store(step.step == 5, Ordering::Relaxed);
            Ok(())
        },
    )
    .unwrap();
    assert!(part.interrupted);

    let resumed = Checkpoint::latest(folder.path()).unwrap();
    assert_eq!(resumed.step(), 5);
    checkpoints.resumed = Some(resumed);
    let mut seen = Vec::new();
    let flag = AtomicBool::new(false);
    let rest = train_with(
        &settings,
        &weather,
        &flag,
        extras(&checkpoints),
        |step, _| {
            seen.push(step.step);
            Ok(())
        },
    )
    .unwrap();
    assert_eq!(seen, [6, 7, 8, 9, 10]);
    let whole = train(&settings, &weather, &flag, |_, _| Ok(())).unwrap();
    assert_eq!(format!("{:?}", rest.steps), format!("{:?}", whole.steps));
    assert_eq!(rest.param_norms, whole.param_norms);
}

#[test]
fn options_that_contradict_the_run_are_refused() {
    let folder = short_run(&["--momentum=0.5"]);
    for (option, run) in [
        ("--lr=0.1", "0.003"),
        ("--clip=none", "norm:1.0"),
        ("--optimizer=adamw", "sgd"),
        ("--momentum=0", "0.5"),
        ("--power=3", "4.0"),
        ("--alpha=3", "4.0"),
        ("--batch=3", "2"),
        ("--eval-every=5", "4"),
        ("--seed=1", "0"),
        ("--non-finite=zero", "skip_step"),
        ("--steps=5", "6"),
    ] {
        let error = resume_error(&[option], folder.path());
        let name = option.split('=').next().unwrap();
        assert!(error.starts_with(name), "{option}: {error}");
        let expected = format!("contradicts the run to resume, which has {run}: ");
        assert!(error.contains(&expected), "{option}: {error}");
    }
    // The same values, and what does not change the result.
    let same = ["--lr=3e-3", "--momentum=0.5", "--steps=6", "--save-every=9"];
    call(&same, "--resume", folder.path()).unwrap();
    let args = ["oscillating-loss", "train", "--resume=a", "--out=b"];
    assert!(Cli::try_parse_from(args).is_err());
}

#[test]
fn a_damaged_checkpoint_is_named_and_an_older_one_offered() {
    let names = [
        "weights.safetensors",
        "optimizer.safetensors",
        "steps.csv",
        "state.json",
    ];
    let folder = short_run(&[]);
    let path = folder.path().join("checkpoint-000006");
    for name in names.into_iter().chain(["crc32c.json"]) {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 1;
        for damaged in [&flipped[..], &whole[..whole.len() / 2], &[]] {
            fs::write(&file, damaged).unwrap();
            let error = resume_error(&[], folder.path());
            assert!(
                error.contains("checkpoint-000006` (start the run again"),
                "{error}"
            );
            let named = names.iter().any(|name| error.contains(name));
            assert!(
                error.contains(name) || name == "crc32c.json" && named,
                "{error}"
            );
        }
        fs::remove_file(&file).unwrap();
        let error = resume_error(&[], folder.path());
        assert!(error.contains(&format!("can't read {name}")), "{error}");
        fs::write(&file, whole).unwrap();
    }
    let newer = folder.path().join("checkpoint-7");
    fs::create_dir(&newer).unwrap();
    ours::mark(&newer).unwrap();
    let error = resume_error(&[], folder.path());
    assert!(error.contains("(remove it to go on from"), "{error}");
    fs::remove_dir_all(&newer).unwrap();
    call(&[], "--resume", folder.path()).unwrap();
}

#[test]
fn no_checkpoint_is_a_clear_error() {
    let folder = TempDir::new().unwrap();
    let error = resume_error(&[], folder.path());
    assert!(error.contains("no checkpoint in"), "{error}");
    let error = resume_error(&[], &folder.path().join("none"));
    assert!(error.contains("can't read"), "{error}");
}

#[test]
fn what_a_kill_leaves_between_two_checkpoints_is_cleared_away() {
    let folder = short_run(&[]);
    let expected = contents(folder.path());
    for left in ["checkpoint-000004", "checkpoint.tmp", "checkpoint.old"] {
        let left = folder.path().join(left);
        fs::create_dir(&left).unwrap();
        fs::write(left.join("state.json"), "{").unwrap();
        ours::mark(&left).unwrap();
    }
    let longer = ["--steps=8"];
    call(&longer, "--resume", folder.path()).unwrap();
    let names: Vec<_> = contents(folder.path()).into_keys().collect();
    let renamed = |name: &String| name.replace("checkpoint-000006", "checkpoint-000008");
    assert_eq!(names, expected.keys().map(renamed).collect::<Vec<_>>());

    // A new run in the same folder, without its own checkpoints.
    call(
        &["--steps=2", "--batch=2", "--eval-every=2"],
        "--out",
        folder.path(),
    )
    .unwrap();
    assert!(checkpoints(folder.path()).is_empty());
}

/// A folder with what another program left: checkpoints, and a file of such a name.
fn others() -> TempDir {
    let folder = TempDir::new().unwrap();
    let trainer = folder.path().join("checkpoint-500");
    fs::create_dir(&trainer).unwrap();
    fs::write(trainer.join("model.safetensors"), "mine").unwrap();
    fs::write(trainer.join("trainer_state.json"), "mine").unwrap();
    fs::write(folder.path().join("checkpoint-000007"), "mine").unwrap();
    folder
}

#[test]
fn what_other_programs_call_a_checkpoint_stays() {
    let folder = others();
    let before = contents(folder.path());
    let error = call(&SHORT, "--out", folder.path()).unwrap_err();
    let names = ["checkpoint-500", "checkpoint-000007"].map(|name| folder.path().join(name));
    for name in &names {
        let named = format!("`{}`", name.display());
        assert!(error.to_string().contains(&named), "{error}");
    }
    let expected = "are in the way of checkpoints, and not only of this program's making";
    assert!(error.to_string().contains(expected), "{error}");
    assert!(checkpoints(folder.path()).len() == 2);

    // Without its own checkpoints, a run has nothing to do with them.
    let plain = ["--steps=2", "--batch=2", "--eval-every=2"];
    call(&plain, "--out", folder.path()).unwrap();
    let after = contents(folder.path());
    for (name, bytes) in &before {
        assert_eq!(after.get(name), Some(bytes), "{name}");
    }

    for name in ["checkpoint.tmp", "checkpoint.old"] {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join(name)).unwrap();
        let mine = folder.path().join(name).join("mine");
        fs::write(&mine, "mine").unwrap();
        let error = call(&SHORT, "--out", folder.path()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        call(&plain, "--out", folder.path()).unwrap();
        assert!(mine.exists());
    }
}

#[test]
fn notes_in_a_checkpoint_keep_it() {
    let folder = short_run(&[]);
    let notes = folder.path().join("checkpoint-000006/notes.txt");
    fs::write(&notes, "mine").unwrap();
    let plain = ["--steps=2", "--batch=2", "--eval-every=2"];
    call(&plain, "--out", folder.path()).unwrap();
    assert!(notes.exists());
    let saving = call(&SHORT, "--out", folder.path());
    let error = saving.unwrap_err().to_string();
    assert!(error.contains("checkpoint-000006"), "{error}");
    assert!(notes.exists());
    fs::remove_file(&notes).unwrap();
    call(&plain, "--out", folder.path()).unwrap();
    assert!(checkpoints(folder.path()).is_empty());
}

/// Where a checkpoint is to be, a folder with something in it appears while training: a save that
/// fails.
#[test]
fn a_checkpoint_that_cannot_be_saved_costs_nothing_else() {
    let settings = Settings {
        batch: 2,
        steps: 6,
        eval_every: 3,
        ..Settings::default()
    };
    let weather = Weather::embedded().unwrap();
    let folder = TempDir::new().unwrap();
    let out = folder.path();
    let checkpoints = Checkpoints {
        out: out.to_owned(),
        save_every: 2,
        source: Source::new(DeviceKind::Cpu, None).unwrap(),
        resumed: None,
    };
    let block = |step: usize| {
        let path = out.join(format!("checkpoint-{step:06}"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("mine"), "").unwrap();
    };
    let train = |blocked: &[usize]| {
        let flag = AtomicBool::new(false);
        train_with(&settings, &weather, &flag, extras(&checkpoints), |at, _| {
            if blocked.contains(&at.step) {
                block(at.step);
                // What was there before is whole, and nothing of the failed one is left.
                assert!(!out.join("checkpoint.tmp").exists());
            }
            Ok(())
        })
        .unwrap()
    };
    let run = train(&[4]);
    assert!(run.unsaved.is_none(), "{:?}", run.unsaved);
    assert_eq!(run.steps.len(), 6);
    assert_eq!(Checkpoint::latest(out).unwrap().step(), 6);

    fs::remove_dir_all(out.join("checkpoint-000004")).unwrap();
    fs::remove_dir_all(out.join("checkpoint-000006")).unwrap();
    let run = train(&[6]);
    let error = format!("{:#}", run.unsaved.unwrap());
    assert!(error.contains("checkpoint-000006"), "{error}");
    assert_eq!(run.steps.len(), 6);
    assert!(!out.join("checkpoint.tmp").exists());
    assert!(out.join("checkpoint-000006/mine").exists());
    assert_eq!(Checkpoint::latest(out).unwrap().step(), 4);
}

#[cfg(unix)]
#[test]
fn sigterm_and_ctrl_c_leave_all_files() {
    for (signal, status) in [("TERM", 143), ("INT", 130)] {
        let folder = TempDir::new().unwrap();
        let out = folder.path();
        let mut child = Command::new(env!("CARGO_BIN_EXE_oscillating-loss"))
            .args(["train", "--steps=1000000", "--batch=2", "--save-every=2"])
            .arg("--out")
            .arg(out)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while checkpoints(out).last().is_none_or(|(step, _)| *step < 4) {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            sleep(Duration::from_millis(2));
        }
        // Twice, as `timeout` does; the second Ctrl-C would drop the files.
        for _ in 0..if signal == "TERM" { 2 } else { 1 } {
            let kill = Command::new("sh")
                .args(["-c", &format!("kill -{signal} {}", child.id())])
                .status();
            assert!(kill.unwrap().success());
            sleep(Duration::from_millis(1));
        }
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{signal}: {errors}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Test loss by step:"), "{text}");
        let metrics = fs::read_to_string(out.join("metrics.csv")).unwrap();
        let (step, _) = checkpoints(out).pop().unwrap();
        assert_eq!(metrics.lines().count(), step + 1, "{signal}");
        assert!(out.join("summary.json").exists());
    }
}

/// A separate file system; none where nobody may mount one.
#[cfg(target_os = "linux")]
struct SmallDisk(TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(folder))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_no_training_and_leaves_no_temporary_files() {
    let Some(disk) = SmallDisk::mount("24m") else {
        println!("skipped: this user may not mount a tmpfs");
        return;
    };
    let out = disk.0.path();
    let mut child = Command::new(env!("CARGO_BIN_EXE_oscillating-loss"))
        .args(["train", "--steps=60", "--batch=2", "--eval-every=5"])
        .args(["--save-every=2", "--out"])
        .arg(out)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while checkpoints(out).last().is_none_or(|(step, _)| *step < 2) {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        sleep(Duration::from_millis(1));
    }
    let fill = fs::File::create(out.join("fill"));
    let filled = fill.and_then(|mut file| {
        loop {
            std::io::Write::write_all(&mut file, &[1; 4096])?;
        }
    });
    let _: Result<(), std::io::Error> = filled;
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("training goes on"), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Test loss by step:"), "{text}");
    assert!(text.contains("\n   60 ") || text.contains(" 60 "), "{text}");
    for name in contents_names(out) {
        let temporary = [".tmp", ".partial"].iter().any(|end| name.contains(end));
        assert!(!temporary, "{name}");
    }
    Checkpoint::latest(out).unwrap();
}

#[cfg(target_os = "linux")]
fn contents_names(folder: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        names.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        if path.is_dir() {
            names.extend(contents_names(&path));
        }
    }
    names
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
