//! The files that commands leave behind, and the errors before any training.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use oscillating_loss::cli::{self, Cli};
use oscillating_loss::out_dir::MARKER;
use serde_json::Value;

pub(crate) fn call(args: &[&str], out: &Path, interrupt: bool) -> anyhow::Result<()> {
    let out = out.to_str().unwrap();
    let args = ["oscillating-loss"]
        .iter()
        .chain(args)
        .copied()
        .chain(["--out", out]);
    cli::run(&Cli::try_parse_from(args)?, &AtomicBool::new(interrupt))
}

const SHORT: [&str; 4] = ["--steps=4", "--batch=2", "--eval-every=2", "--seed=3"];

pub(crate) fn with<'a>(command: &[&'a str]) -> Vec<&'a str> {
    command.iter().chain(&SHORT).copied().collect()
}

pub(crate) fn json(path: &Path) -> Value {
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

/// What a run leaves in the folder of its arm.
const OF_RUN: [&str; 6] = [
    "events.out.tfevents",
    "index.html",
    "metrics.csv",
    "param_norms.csv",
    "run.json",
    "scalars.csv",
];

/// All files of a call: those of the folder, and of the arms in it.
fn expected(top: &[&str], arms: &[&str]) -> Vec<String> {
    let of_arm = |arm: &&str| {
        let files = OF_RUN.iter().chain(&["weights.safetensors"]);
        files
            .map(|file| format!("{arm}/{file}"))
            .collect::<Vec<_>>()
    };
    let mut all: Vec<String> = top.iter().map(ToString::to_string).collect();
    all.extend(arms.iter().flat_map(of_arm));
    all.sort();
    all
}

#[test]
fn compare_writes_every_file_and_the_schema_holds() {
    let out = tempfile::tempdir().unwrap();
    let args = with(&["compare", "--clip=none,norm:1.0", "--lr=1e-4"]);
    // Twice: the second call replaces every file of the first.
    for _ in 0..2 {
        call(&args, out.path(), false).unwrap();
    }
    let top = ["config.json", "index.html", "metrics.csv", "summary.json"];
    assert_eq!(files(out.path()), expected(&top, &["none", "norm-1.0"]));

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
fn a_sweep_writes_its_page() {
    let out = tempfile::tempdir().unwrap();
    let args = with(&[
        "sweep",
        "--lr=1e-4,1e-3",
        "--clip=none,value:0.1",
        "--seeds=1",
    ]);
    call(&args, out.path(), false).unwrap();
    let expected = ["config.json", "index.html", "metrics.csv", "summary.json"];
    assert_eq!(files(out.path()), expected);
    let page = fs::read_to_string(out.path().join("index.html")).unwrap();
    for part in [
        "Which learning rates work?",
        "persistence",
        "usable learning rates",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let summary = json(&out.path().join("summary.json"));
    assert_eq!(summary["arms"].as_array().unwrap().len(), 4);
}

#[test]
fn after_an_interrupt_the_files_are_complete() {
    let out = tempfile::tempdir().unwrap();
    // The flag is up from the start, so no run begins: what is left must be readable all the same.
    call(&with(&["train"]), out.path(), true).unwrap();
    let left = files(out.path());
    for name in [
        "config.json",
        "metrics.csv",
        "summary.json",
        "norm-1.0/run.json",
    ] {
        assert!(left.iter().any(|file| file == name), "{name}: {left:?}");
    }
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
    for args in commands.iter().chain([&study]) {
        let out = tempfile::tempdir().unwrap();
        let mine = out.path().join("config.json");
        fs::write(&mine, "mine").unwrap();
        let error = call(args, out.path(), false).unwrap_err().to_string();
        let expected = "has files that this program did not write";
        assert!(error.contains(expected), "{args:?}: {error}");
        assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1, "{args:?}");
    }

    // In a folder of ours, files of other names stay; the second call replaces those of the first.
    let out = tempfile::tempdir().unwrap();
    let train = with(&["train"]);
    call(&train, out.path(), false).unwrap();
    let notes = ["notes.txt", "norm-1.0/notes.txt"];
    for name in notes {
        fs::write(out.path().join(name), "mine").unwrap();
    }
    call(&train, out.path(), false).unwrap();
    for name in notes {
        assert_eq!(
            fs::read_to_string(out.path().join(name)).unwrap(),
            "mine",
            "{name}"
        );
    }
    let events = files(&out.path().join("norm-1.0"));
    let events = events.iter().filter(|file| *file == "events.out.tfevents");
    assert_eq!(events.count(), 1);

    // The log of another program is refused before training.
    let out = tempfile::tempdir().unwrap();
    call(&with(&["find-max-norm"]), out.path(), false).unwrap();
    fs::create_dir(out.path().join("norm-1.0")).unwrap();
    let mine = out.path().join("norm-1.0/metrics.csv");
    fs::write(&mine, "mine").unwrap();
    let error = format!("{:#}", call(&train, out.path(), false).unwrap_err());
    assert!(error.contains("norm-1.0"), "{error}");
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
}

/// Runs the command twice; before the second call, a folder stands where a file would be. Returns
/// the error and what is left.
fn with_a_folder_in_place_of(name: &str, args: &[&str]) -> (String, Vec<String>) {
    let out = tempfile::tempdir().unwrap();
    call(args, out.path(), false).unwrap();
    fs::remove_file(out.path().join(name)).unwrap();
    fs::create_dir(out.path().join(name)).unwrap();
    let error = format!("{:#}", call(args, out.path(), false).unwrap_err());
    (error, files(out.path()))
}

#[test]
fn a_file_that_cannot_be_written_costs_nothing_else() {
    let sweep = with(&["sweep", "--lr=1e-4", "--clip=none", "--seeds=1"]);
    let compare = with(&["compare", "--clip=none"]);
    let weights = "none/weights.safetensors";
    for (args, names) in [
        (sweep, &["index.html", "metrics.csv", "summary.json"][..]),
        (
            compare,
            &["index.html", "metrics.csv", "summary.json", weights],
        ),
    ] {
        for name in names {
            let (error, left) = with_a_folder_in_place_of(name, &args);
            assert!(error.contains(name), "{name}: {error}");
            for other in names.iter().filter(|other| *other != name) {
                assert!(left.iter().any(|file| file == other), "{other}: {left:?}");
            }
            let is_temporary = |file: &String| file.contains(".tmp") || file.contains(".partial");
            assert!(!left.iter().any(is_temporary), "{left:?}");
        }
    }
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
