//! The backend over candle's operations uses only those that candle's Metal backend has, for the
//! dtypes that it uses them with: f32, casts from and to halves, and u8 as the result of a
//! comparison. Nobody has run Metal, so this reads the source of candle-core.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use super::source;

/// Methods of `Tensor` that `backend/candle_ops` may call, and what the Metal backend must have.
const OPERATIONS: &[(&str, &[&str])] = &[
    (
        "abs",
        &[
            "(\"uabs\", DType::F32) => contiguous::",
            "(\"uabs\", DType::F32) => strided::",
        ],
    ),
    ("affine", &["\"affine_f32\"", "\"affine_f32_strided\""]),
    ("broadcast_mul", BINARY),
    ("cat", COPY),
    ("clamp", BINARY),
    ("contiguous", COPY),
    ("eq", BINARY),
    ("force_contiguous", COPY),
    ("gt", BINARY),
    ("max", &["(ReduceOp::Max, DType::F32) => (\"fast_max_f32\""]),
    ("minimum", BINARY),
    ("powf", &["\"powf_f32\"", "\"powf_f32_strided\""]),
    (
        "sqr",
        &[
            "(\"usqr\", DType::F32) => contiguous::",
            "(\"usqr\", DType::F32) => strided::",
        ],
    ),
    (
        "sqrt",
        &[
            "(\"usqrt\", DType::F32) => contiguous::",
            "(\"usqrt\", DType::F32) => strided::",
        ],
    ),
    ("sum", &["(ReduceOp::Sum, DType::F32) => (\"fast_sum_f32\""]),
    ("to_dtype", CASTS),
    (
        "to_vec1",
        &["DType::F32 => Ok(CpuStorage::F32(self.to_cpu()?))"],
    ),
    (
        "where_cond",
        &["(DType::U8, DType::F32) => \"where_u8_f32\""],
    ),
    ("zeros", &["fn zeros_impl("]),
    ("zeros_like", &["fn zeros_impl("]),
    // Names that numbers and iterators have, too: there, not on tensors.
    ("flatten", COPY),
    ("floor", &["(\"ufloor\", DType::F32) => contiguous::"]),
    ("new", &["fn storage_from_cpu_storage_owned("]),
    ("recip", &["(\"urecip\", DType::F32) => contiguous::"]),
    // From or to the host, or another view of the same storage.
    ("clone", &[]),
    ("detach", &[]),
    ("device", &[]),
    ("dims2", &[]),
    ("dtype", &[]),
    ("elem_count", &[]),
    ("flatten_all", COPY),
    ("from_vec", &["fn storage_from_cpu_storage_owned("]),
    ("narrow", &[]),
    ("reshape", COPY),
    ("shape", &[]),
    ("t", &[]),
    ("to_device", &["fn storage_from_cpu_storage_owned("]),
];
/// Names of the kernels are made from those of operation and dtype.
const BINARY: &[&str] = &["format!(\"{op}_{}{}\", dtype.as_str(), suffix)"];
const COPY: &[&str] = &[
    "DType::F32 => candle_metal_kernels::copy2d::FLOAT",
    "DType::F16 => candle_metal_kernels::copy2d::HALF",
    "DType::BF16 => candle_metal_kernels::copy2d::BFLOAT",
];
const CASTS: &[&str] = &[
    "(DType::F16, DType::F32) => \"cast_f16_f32\"",
    "(DType::BF16, DType::F32) => \"cast_bf16_f32\"",
    "(DType::F32, DType::F16) => \"cast_f32_f16\"",
    "(DType::F32, DType::BF16) => \"cast_f32_bf16\"",
    "(DType::U8, DType::F32) => \"cast_u8_f32\"",
];

/// Where cargo keeps the source of the candle-core that `Cargo.lock` pins.
fn candle_core() -> PathBuf {
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.lock");
    let lock = fs::read_to_string(lock).unwrap();
    let version = lock
        .split("[[package]]")
        .filter(|package| package.contains("name = \"candle-core\""))
        .filter_map(|package| package.split("version = \"").nth(1)?.split('"').next())
        .find(|version| version.starts_with("0.11."))
        .unwrap();
    let home = env::var("CARGO_HOME").map_or_else(
        |_| Path::new(&env::var("HOME").unwrap()).join(".cargo"),
        PathBuf::from,
    );
    let registries = fs::read_dir(home.join("registry/src")).unwrap();
    let mut folders = registries.map(|registry| {
        registry
            .unwrap()
            .path()
            .join(format!("candle-core-{version}"))
    });
    folders
        .find(|folder| folder.is_dir())
        .expect("candle-core's source in cargo's registry")
}

/// What a text has between `start` and `end`, each time.
fn between<'a>(text: &'a str, start: &str, end: &str) -> BTreeSet<&'a str> {
    let rest = text.split(start).skip(1);
    rest.filter_map(|rest| rest.split(end).next()).collect()
}

/// Names of functions and methods that a source calls.
fn calls(text: &str) -> BTreeSet<&str> {
    let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let code = text.lines().map(|line| line.split("//").next().unwrap());
    let calls = code.flat_map(|line| line.match_indices('(').map(move |(at, _)| &line[..at]));
    let mut names = BTreeSet::new();
    for before in calls {
        // `to_vec1::<f32>(` is a call of `to_vec1`.
        let before = before
            .strip_suffix('>')
            .and_then(|before| before.rsplit_once("::<"))
            .map_or(before, |(before, _)| before);
        let start = before.rfind(|c| !is_name(c)).map_or(0, |at| at + 1);
        if before[..start].ends_with(['.', ':']) {
            names.insert(&before[start..]);
        }
    }
    names
}

#[test]
fn candles_metal_backend_has_all_operations_of_ours() {
    let candle = candle_core().join("src");
    let tensor = fs::read_to_string(candle.join("tensor.rs")).unwrap();
    let metal = fs::read_to_string(candle.join("metal_backend/mod.rs")).unwrap();

    let mut methods = between(&tensor, "pub fn ", "(");
    for macro_name in [
        "unary_op",
        "binary_op",
        "binary_op_scalar",
        "broadcast_binary_op",
    ] {
        methods.extend(between(&tensor, &format!("    {macro_name}!("), ","));
    }
    let methods: BTreeSet<&str> = methods
        .into_iter()
        .filter_map(|name| name.split('<').next())
        .collect();
    assert!(methods.contains("broadcast_mul") && methods.contains("where_cond"));

    let ours = fs::read_dir(source("candle-grad-clip").join("backend/candle_ops")).unwrap();
    let ours = ours.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
    let ours = ours.collect::<String>();
    let called: BTreeSet<&str> = calls(&ours).intersection(&methods).copied().collect();
    assert!(
        called.contains("affine") && called.contains("to_vec1"),
        "{called:?}"
    );

    let listed: BTreeSet<&str> = OPERATIONS.iter().map(|(name, _)| *name).collect();
    let unlisted: Vec<&&str> = called.difference(&listed).collect();
    assert!(
        unlisted.is_empty(),
        "has candle's Metal backend kernels for {unlisted:?}?"
    );
    for (name, needs) in OPERATIONS {
        for need in *needs {
            assert!(metal.contains(need), "`{name}` on Metal: {need}");
        }
    }
}
