//! Rules as arguments, studies that go on, and arguments that are refused.

use std::fs;

use clap::Parser;
use oscillating_loss::cli::Cli;

use crate::outputs::{call, json, with};

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
