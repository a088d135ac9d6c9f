//! The layers of both crates: imports go down, and no files import each other in a cycle.
#![allow(clippy::unwrap_used)]

mod imports;
mod metal;

use std::path::{Path, PathBuf};

use imports::{faults, imports_of};

/// From bottom to top. An import goes to a lower layer, or stays within its file or folder.
const LIBRARY: &[&[&str]] = &[
    &["candle_versions", "serde_float", "skip_reason"],
    &["error"],
    &["check", "threads"],
    &["tensors"],
    &["vars"],
    &["as_vars", "gradients", "groups", "param_state"],
    &["backend", "clip", "loss", "loss_scaler"],
    &["pipeline"],
    &["optim"],
    &["accumulate", "functions"],
    &["optimizer"],
    &["checkpoint", "norm_statistics"],
    &["lib"],
];
const KERNELS: &[&[&str]] = &[
    &[
        "block",
        "cuda",
        "half_conversions",
        "norm_type",
        "simd",
        "units",
        "wide",
    ],
    &["element", "scaled_power_sum"],
    &["convert", "edit", "measure"],
    &["measure_units", "unit_edit"],
    &["grad_edit"],
    &["accumulate", "update"],
    &["adamw", "sgd"],
    &["lib"],
];

fn source(package: &str) -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("../crates").join(package).join("src")
}

#[test]
fn imports_of_the_library_point_down() {
    let faults = faults(&imports_of(&source("candle-grad-clip")), LIBRARY);
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn imports_of_the_kernels_point_down() {
    let faults = faults(&imports_of(&source("candle-grad-clip-kernels")), KERNELS);
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// A made-up tree with one fault of each kind.
#[test]
fn faults_are_found() {
    let root = std::env::temp_dir().join(format!("architecture-{}", std::process::id()));
    let files = [
        ("lib.rs", "mod base;\nmod top;\nmod side;\nmod new;\n"),
        (
            "base.rs",
            "//! use crate::top::Docs;\nuse crate::top::Top;\n",
        ),
        ("side.rs", "use crate::{\n    base::Base,\n    top,\n};\n"),
        ("new.rs", ""),
        (
            "top/mod.rs",
            "mod child;\nuse child::Child;\npub struct Top;\n",
        ),
        (
            "top/child.rs",
            "use std::fmt;\nuse super::Top;\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n",
        ),
    ];
    for (path, text) in files {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let imports = imports_of(&root);
    std::fs::remove_dir_all(&root).unwrap();
    let found = faults(&imports, &[&["base"], &["side", "top"], &["lib"]]);
    let expected = [
        "new.rs:1: `new` is on no floor",
        "base.rs:2: `base` imports `top`, which is on a higher floor",
        "side.rs:1: `side` imports `top`, which is on the same floor",
        "top/child.rs:2: a circle: top/child.rs -> top/mod.rs -> top/child.rs",
    ];
    assert_eq!(found, expected);
}
