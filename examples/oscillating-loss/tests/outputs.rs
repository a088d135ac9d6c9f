//! The files that commands leave behind, and the errors before any training.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use oscillating_loss::cli::{self, Cli};
use oscillating_loss::ours::MARKER;
use serde_json::Value;

fn call(args: &[&str], out: &Path, interrupt: bool) -> anyhow::Result<()> {
    let out = out.to_str().unwrap();
    let args = ["oscillating-loss"]
        .iter()
        .chain(args)
        .copied()
        .chain(["--out", out]);
    cli::run(&Cli::try_parse_from(args)?, &AtomicBool::new(interrupt))
}

const SHORT: [&str; 4] = ["--steps=4", "--batch=2", "--eval-every=2", "--seed=3"];

fn with<'a>(command: &[&'a str]) -> Vec<&'a str> {
    command.iter().chain(&SHORT).copied().collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

/// Every file below a folder, without the changing part of event files' names, and without markers.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(
                files(&entry.path())
                    .into_iter()
                    .map(|file| format!("{name}/{file}")),
            );
        } else if name.starts_with("events.out.tfevents.") {
            found.push("events.out.tfevents".to_owned());
        } else if name != MARKER {
            found.push(name);
        }
    }
    found.sort();
    found
}

const PICTURES: [&str; 2] = ["grad_norm.svg", "loss.svg"];

#[test]
fn compare_writes_every_file_and_the_schema_holds() {
    let out = tempfile::tempdir().unwrap();
    let args = with(&["compare", "--clip=none,norm:1.0", "--lr=1e-4"]);
    // Twice: the second call replaces every file of the first.
    for _ in 0..2 {
        call(&args, out.path(), false).unwrap();
    }
    let mut expected = vec!["config.json", "metrics.csv", "summary.json"];
    expected.extend(PICTURES);
    expected.extend(["none/events.out.tfevents", "none/weights.safetensors"]);
    expected.extend(["none/param_norms.csv", "none/param_norms.svg"]);
    let of_norm = expected
        .iter()
        .filter_map(|file| file.strip_prefix("none/"));
    let of_norm: Vec<String> = of_norm.map(|file| format!("norm-1.0/{file}")).collect();
    expected.extend(of_norm.iter().map(String::as_str));
    expected.sort_unstable();
    assert_eq!(files(out.path()), expected);

    let summary = json(&out.path().join("summary.json"));
    let top = ["arms", "baselines", "best_test_loss", "usable_lr_decades"];
    assert_eq!(keys(&summary), top);
    assert_eq!(keys(&summary["baselines"]), ["constant", "persistence"]);
    assert_eq!(keys(&summary["best_test_loss"]), ["none", "norm:1.0"]);
    assert_eq!(keys(&summary["usable_lr_decades"]), ["none", "norm:1.0"]);
    let arm = &summary["arms"][1];
    let fields = [
        "arm",
        "best_test_loss",
        "clipped_fraction",
        "diverged",
        "final_test_loss",
        "lr",
        "max_total_norm",
        "momentum",
        "ms_per_step",
        "optimizer",
        "power",
        "roughness",
        "seed",
    ];
    assert_eq!(keys(arm), fields);
    assert_eq!(arm["arm"], "norm:1.0");
    assert_eq!(arm["optimizer"], "sgd");
    assert_eq!(arm["seed"], 3);
    assert_eq!(arm["diverged"], false);
    for field in [
        "best_test_loss",
        "clipped_fraction",
        "max_total_norm",
        "ms_per_step",
    ] {
        assert!(
            arm[field].as_f64().unwrap() > 0.0,
            "{field}: {}",
            arm[field]
        );
    }

    let metrics = fs::read_to_string(out.path().join("metrics.csv")).unwrap();
    let mut lines = metrics.lines();
    let header = "arm,optimizer,power,lr,seed,step,train_loss,test_loss,total_norm,clipped_norm,\
                  clip_coef,was_clipped,skipped";
    assert_eq!(lines.next(), Some(header));
    assert_eq!(lines.count(), 8);
}

#[test]
fn param_norms_add_up_to_the_total_norm() {
    let out = tempfile::tempdir().unwrap();
    call(&with(&["train", "--clip=norm:1.0"]), out.path(), false).unwrap();
    let read = |path: &Path| -> Vec<Vec<String>> {
        let text = fs::read_to_string(path).unwrap();
        let fields = |line: &str| line.split(',').map(str::to_owned).collect();
        text.lines().map(fields).collect()
    };
    let norms = read(&out.path().join("norm-1.0/param_norms.csv"));
    let metrics = read(&out.path().join("metrics.csv"));
    assert_eq!((norms.len(), norms[0].len()), (5, 40));
    assert_eq!(norms[0][..2], ["step", "blocks.0.attn.k.bias"]);
    assert_eq!(metrics[0][8], "total_norm");
    for (norms, metrics) in norms.iter().zip(&metrics).skip(1) {
        let number = |text: &String| text.parse::<f64>().unwrap();
        let power: f64 = norms[1..].iter().map(|norm| number(norm).powi(2)).sum();
        let total = number(&metrics[8]);
        assert_eq!(norms[0], metrics[5], "steps");
        assert!(
            (power.sqrt() / total - 1.0).abs() < 1e-12,
            "{power} {total}"
        );
    }
}

#[test]
fn histograms_are_there_on_demand_and_change_nothing() {
    let [plain, asked] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let train = with(&["train", "--clip=value:0.1", "--optimizer=adamw"]);
    call(&train, plain.path(), false).unwrap();
    let args = [&train[..], &["--histograms=3"]].concat();
    call(&args, asked.path(), false).unwrap();
    let metrics = |out: &Path| fs::read(out.join("metrics.csv")).unwrap();
    assert!(metrics(plain.path()) == metrics(asked.path()));
    let count = |out: &Path, tag: &str| {
        let mut entries = fs::read_dir(out.join("value-0.1")).unwrap();
        let event_file = entries.find_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_str()?;
            name.starts_with("events.out")
                .then(|| fs::read(&path).unwrap())
        });
        let bytes = event_file.unwrap();
        bytes
            .windows(tag.len())
            .filter(|part| *part == tag.as_bytes())
            .count()
    };
    assert_eq!(count(plain.path(), "gradients/"), 0);
    // 39 Vars, at step 3 of 4.
    assert_eq!(count(asked.path(), "gradients/"), 39);
    assert_eq!(count(asked.path(), "gradients/head.weight"), 1);
    let both = with(&["train", "--histograms=3", "--save-every=2"]);
    assert!(call(&both, plain.path(), false).is_err());
}

#[test]
fn a_run_that_diverges_is_null_in_the_summary() {
    let out = tempfile::tempdir().unwrap();
    call(
        &with(&["train", "--clip=none", "--lr=1e9"]),
        out.path(),
        false,
    )
    .unwrap();
    let summary = json(&out.path().join("summary.json"));
    let arm = &summary["arms"][0];
    assert_eq!(arm["diverged"], true);
    for field in ["final_test_loss", "best_test_loss", "roughness"] {
        assert_eq!(arm[field], Value::Null, "{field}");
    }
    assert_eq!(summary["usable_lr_decades"]["none"], 0.0);
}

#[test]
fn momentum_is_for_sgd() {
    let out = tempfile::tempdir().unwrap();
    for command in ["train", "compare", "sweep", "find-max-norm"] {
        let args = with(&[command, "--momentum=0.9", "--optimizer=adamw"]);
        let error = call(&args, &out.path().join(command), false).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("--momentum 0.9 only goes with --optimizer sgd"),
            "{error}"
        );
    }
    assert_eq!(files(out.path()), [""; 0]);
    call(&with(&["train", "--momentum=0.9"]), out.path(), false).unwrap();
    for (file, run) in [("config.json", "runs"), ("summary.json", "arms")] {
        assert_eq!(
            json(&out.path().join(file))[run][0]["momentum"],
            0.9,
            "{file}"
        );
    }
}

#[test]
fn a_sweep_writes_its_picture() {
    let out = tempfile::tempdir().unwrap();
    let args = with(&[
        "sweep",
        "--lr=1e-4,1e-3",
        "--clip=none,value:0.1",
        "--seeds=1",
    ]);
    call(&args, out.path(), false).unwrap();
    let expected = ["config.json", "metrics.csv", "summary.json", "sweep.svg"];
    assert_eq!(files(out.path()), expected);
    let summary = json(&out.path().join("summary.json"));
    assert_eq!(summary["arms"].as_array().unwrap().len(), 4);
}

#[test]
fn every_rule_is_an_arm() {
    let out = tempfile::tempdir().unwrap();
    let rules =
        "--clip=none,param-norm:1,block-rms:1,auto,quantile,zclip:z_thresh=2.5,warmup=2,adagc";
    let args = with(&["compare", rules, "--clip=skip:z=3", "--clip=norm:1,eps=0"]);
    call(&args, out.path(), false).unwrap();
    let summary = json(&out.path().join("summary.json"));
    let arms = [
        "none",
        "param-norm:1",
        "block-rms:1",
        "auto",
        "quantile",
        "zclip:z_thresh=2.5,warmup=2",
        "adagc",
        "skip:z=3",
        "norm:1,eps=0",
    ];
    for (at, arm) in arms.iter().enumerate() {
        assert_eq!(summary["arms"][at]["arm"], *arm);
        let weights = out
            .path()
            .join(arm.replace(':', "-"))
            .join("weights.safetensors");
        assert!(weights.exists(), "{arm}");
    }
    let twice = with(&["sweep", "--clip=auto,norm:1", "--clip=norm:1.0"]);
    let error = call(&twice, out.path(), false).unwrap_err().to_string();
    assert_eq!(
        error,
        "--clip has `norm:1` and `norm:1.0`, which are the same: leave one out"
    );
}

#[test]
fn a_study_goes_on_where_it_was_stopped() {
    let out = tempfile::tempdir().unwrap();
    let study = |clip, seeds, interrupt| {
        let args = [
            "study",
            clip,
            seeds,
            "--optimizer=sgd",
            "--power=4",
            "--lr=1e-3",
            "--steps=1",
        ];
        call(&args, out.path(), interrupt).unwrap();
        fs::read_to_string(out.path().join("runs.jsonl")).unwrap_or_default()
    };
    assert_eq!(study("--clip=none,auto", "--seeds=1", true), "");
    let first = study("--clip=none,auto", "--seeds=1", false);
    assert_eq!(first.lines().count(), 2);
    // What is there stays as it is; what is missing comes after it.
    let second = study("--clip=none,auto", "--seeds=2", false);
    assert_eq!(second.lines().count(), 4);
    assert!(second.starts_with(&first));
    // A line that was cut off is done again; the runs are the same whenever they are done.
    fs::write(out.path().join("runs.jsonl"), &second[..second.len() - 9]).unwrap();
    let third = study("--clip=none,auto", "--seeds=2", false);
    assert_eq!(sorted(&third), sorted(&second));
    assert_eq!(study("--clip=auto", "--seeds=1", false), third);
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn after_an_interrupt_the_files_are_complete() {
    let out = tempfile::tempdir().unwrap();
    // The flag is up from the start, so no run begins: what is left must be readable all the same.
    call(&with(&["train"]), out.path(), true).unwrap();
    let mut expected = vec!["config.json", "metrics.csv", "summary.json"];
    expected.extend(PICTURES);
    expected.push("norm-1.0/events.out.tfevents");
    expected.sort_unstable();
    assert_eq!(files(out.path()), expected);
    assert_eq!(
        json(&out.path().join("summary.json"))["arms"],
        Value::Array(Vec::new())
    );
}

#[test]
fn an_out_that_cannot_be_written_is_an_error_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "mine").unwrap();
    for out in [file.clone(), file.join("below")] {
        // So many steps that a run would not come back.
        let args = ["train", "--steps=4000000000"];
        let error = format!("{:#}", call(&args, &out, false).unwrap_err());
        let expected = format!("can't write to `{}`: choose another folder", out.display());
        assert!(error.contains(&expected), "{error}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn files_of_somebody_else_are_not_replaced() {
    let commands = ["train", "compare", "sweep", "find-max-norm"].map(|command| with(&[command]));
    let study = vec!["study", "--clip=none", "--seeds=1", "--steps=1"];
    for (args, name) in commands.iter().chain([&study]).zip([
        "config.json",
        "loss.svg",
        "sweep.svg",
        "metrics.csv",
        "runs.jsonl",
    ]) {
        let out = tempfile::tempdir().unwrap();
        let mine = out.path().join(name);
        fs::write(&mine, "mine").unwrap();
        let error = call(args, out.path(), false).unwrap_err().to_string();
        let expected = format!("`{}` would be replaced, but this", mine.display());
        assert!(error.starts_with(&expected), "{args:?}: {error}");
        assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "{args:?}");
    }

    let out = tempfile::tempdir().unwrap();
    let arm = out.path().join("norm-1.0");
    fs::create_dir(&arm).unwrap();
    for name in [
        "events.out.tfevents.1700000000.localhost.1.0",
        ".probe",
        "notes.txt",
    ] {
        fs::write(arm.join(name), "mine").unwrap();
        fs::write(out.path().join(name), "mine").unwrap();
    }
    // Twice: the second call replaces the event file of the first, and no other.
    for _ in 0..2 {
        call(&with(&["train"]), out.path(), false).unwrap();
    }
    let is_mine = |name: &str| fs::read_to_string(arm.join(name)).is_ok_and(|text| text == "mine");
    assert!(is_mine("events.out.tfevents.1700000000.localhost.1.0"));
    assert!(is_mine(".probe") && is_mine("notes.txt"));
    let probe = fs::read_to_string(out.path().join(".probe")).unwrap();
    assert_eq!(probe, "mine");
    let events = files(&arm);
    let events = events.iter().filter(|file| *file == "events.out.tfevents");
    assert_eq!(events.count(), 2);

    let out = tempfile::tempdir().unwrap();
    let weights = out.path().join("norm-1.0/weights.safetensors");
    fs::create_dir(out.path().join("norm-1.0")).unwrap();
    fs::write(&weights, "mine").unwrap();
    let error = call(&with(&["train"]), out.path(), false).unwrap_err();
    let expected = format!("`{}` would be replaced", weights.display());
    assert!(error.to_string().starts_with(&expected), "{error}");
    assert_eq!(fs::read_to_string(&weights).unwrap(), "mine");
    assert_eq!(files(out.path()), ["norm-1.0/weights.safetensors"]);
}

/// Runs the command twice; before the second call, folders stand where these files would be.
fn with_folders_in_place_of(names: &[&str], args: &[&str], out: &Path) -> String {
    call(args, out, false).unwrap();
    for path in files(out).iter().map(|file| out.join(file)) {
        if path.exists() {
            fs::remove_file(path).unwrap();
        }
    }
    for name in names {
        fs::create_dir(out.join(name)).unwrap();
    }
    format!("{:#}", call(args, out, false).unwrap_err())
}

#[test]
fn a_picture_that_cannot_be_written_costs_nothing_else() {
    let out = tempfile::tempdir().unwrap();
    let sweep = with(&["sweep", "--lr=1e-4", "--clip=none", "--seeds=1"]);
    let error = with_folders_in_place_of(&["sweep.svg"], &sweep, out.path());
    assert!(error.contains("sweep.svg"), "{error}");
    let expected = ["config.json", "metrics.csv", "summary.json"];
    assert_eq!(files(out.path()), expected);
    let metrics = fs::read_to_string(out.path().join("metrics.csv")).unwrap();
    assert_eq!(metrics.lines().count(), 5);

    for command in ["train", "compare"] {
        let out = tempfile::tempdir().unwrap();
        let args = with(&[command, "--clip=none"]);
        let lost = [
            "none/weights.safetensors",
            "none/param_norms.svg",
            "loss.svg",
        ];
        let error = with_folders_in_place_of(&lost, &args, out.path());
        assert!(lost.iter().all(|name| error.contains(name)), "{error}");
        let left = files(out.path());
        for name in ["metrics.csv", "summary.json", "none/param_norms.csv"] {
            assert!(left.iter().any(|file| file == name), "{name}: {left:?}");
        }
        let temporary = |file: &String| {
            let extension = Path::new(file).extension();
            extension.is_some_and(|extension| extension == "tmp" || extension == "partial")
        };
        assert!(!left.iter().any(temporary), "{left:?}");
        assert!(left.iter().any(|file| file == "grad_norm.svg"), "{left:?}");
    }
}

#[test]
fn metrics_that_cannot_be_written_cost_nothing_else() {
    let out = tempfile::tempdir().unwrap();
    let args = with(&["train", "--clip=none"]);
    call(&args, out.path(), false).unwrap();
    let written = files(out.path());
    for file in written.iter().filter(|file| *file != "config.json") {
        let path = out.path().join(file);
        if path.exists() {
            fs::remove_file(path).unwrap();
        }
    }
    fs::create_dir(out.path().join("metrics.csv")).unwrap();
    let error = format!("{:#}", call(&args, out.path(), false).unwrap_err());
    assert!(error.contains("metrics.csv"), "{error}");
    let others = |files: Vec<String>| -> Vec<String> {
        let is_other = |file: &String| file != "metrics.csv";
        files.into_iter().filter(is_other).collect()
    };
    assert_eq!(others(files(out.path())), others(written));
}

#[test]
fn find_max_norm_leaves_its_numbers() {
    let out = tempfile::tempdir().unwrap();
    call(&with(&["find-max-norm"]), out.path(), false).unwrap();
    let summary = json(&out.path().join("summary.json"));
    assert_eq!(summary["arms"][0]["arm"], "none");
    assert_eq!(
        files(out.path()),
        ["config.json", "metrics.csv", "summary.json"]
    );
}

#[test]
fn wrong_arguments_are_refused() {
    let wrong = [
        "train --clip=norm:0",
        "train --clip=norm",
        "train --clip=norm:-1",
        "train --clip=zlcip",
        "train --clip=none,norm:1",
        "compare --clip=norm:1,,none",
        "sweep --clip=warmup=3",
        "study --clip=zclip:q=1",
        "train --clip=value:NaN",
        "train --lr=0",
        "train --lr=inf",
        "train --power=0.5",
        "train --alpha=-1",
        "train --momentum=1",
        "train --momentum=-0.1",
        "sweep --momentum=NaN",
        "train --batch=0",
        "train --steps=0",
        "train --data=a.csv",
        "train --target=a",
        "sweep --seeds=0",
        "train --device=tpu",
    ];
    for args in wrong {
        let args = std::iter::once("oscillating-loss").chain(args.split(' '));
        assert!(
            Cli::try_parse_from(args.clone()).is_err(),
            "{:?}",
            args.collect::<Vec<_>>()
        );
    }
}
