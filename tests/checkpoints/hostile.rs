//! Whatever a file holds: no panic, no partial load.

use std::fs;
use std::path::Path;

use support::device::device;

use anyhow::Result;
use candle_core::{DType, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer, Error};
use candle_nn::{Optimizer, ParamsAdamW};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::checkpoints::{Folder, edited, split, with_header, with_tensor};

/// A small optimizer that has taken a step, and its Var.
fn optimizer() -> Result<(Var, ClippedOptimizer<AdamW>)> {
    let w = Var::new(&[3f32, 4.0], device())?;
    let vars = vec![
        ("w".to_string(), w.clone()),
        ("x".to_string(), Var::zeros(1, DType::F64, device())?),
    ];
    let opt = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default())?;
    let mut opt = ClippedOptimizer::wrap(opt, vars, Clip::norm(1.0))?;
    opt.backward_step(&w.sqr()?.sum_all()?)?;
    Ok((w, opt))
}

/// A place for the files of a test, and one whole checkpoint.
pub(super) struct Bench {
    pub(super) folder: Folder,
    pub(super) w: Var,
    pub(super) opt: ClippedOptimizer<AdamW>,
    /// What the optimizer is.
    pub(super) state: Vec<u8>,
    /// A checkpoint of it, some steps later.
    pub(super) bytes: Vec<u8>,
}

impl Bench {
    pub(super) fn new() -> Result<Self> {
        let folder = Folder::in_memory()?;
        let (w, mut later) = optimizer()?;
        for _ in 0..3 {
            later.backward_step(&w.sqr()?.sum_all()?)?;
        }
        let bytes = saved(&later, &folder)?;
        let (w, opt) = optimizer()?;
        let state = saved(&opt, &folder)?;
        Ok(Self {
            folder,
            w,
            opt,
            state,
            bytes,
        })
    }

    /// Loads a file of these bytes. An error has changed nothing, a success nothing that a step
    /// can't take.
    pub(super) fn load(&mut self, bytes: &[u8]) -> Result<candle_grad_clip::Result<()>> {
        let path = self.folder.join("hostile");
        fs::write(&path, bytes)?;
        let result = self.opt.load(&path);
        if result.is_ok() {
            let _ = self.opt.backward_step(&self.w.sqr()?.sum_all()?);
            let _ = saved(&self.opt, &self.folder)?;
            (self.w, self.opt) = optimizer()?;
        }
        assert_eq!(saved(&self.opt, &self.folder)?, self.state);
        Ok(result)
    }

    /// The error of a file of these bytes.
    pub(super) fn refused(&mut self, bytes: &[u8]) -> Result<Error> {
        let result = self.load(bytes)?;
        result
            .err()
            .ok_or_else(|| anyhow::anyhow!("it was loaded: {:?}", String::from_utf8_lossy(bytes)))
    }
}

fn saved(opt: &ClippedOptimizer<AdamW>, folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join("saved");
    opt.save(&path)?;
    Ok(fs::read(path)?)
}

/// Sets or adds a value, or removes it.
pub(super) fn set(value: &mut Value, pointer: &str, new: Option<Value>) {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match value.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = new.unwrap(),
        object => {
            let object = object.as_object_mut().unwrap();
            match new {
                Some(new) => drop(object.insert(key.to_string(), new)),
                None => drop(object.remove(key).unwrap()),
            }
        }
    }
}

#[test]
fn cut_anywhere_or_with_more_behind_it() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    for len in 0..bytes.len() {
        bench.refused(&bytes[..len])?;
    }
    bench.refused(&[&bytes[..], &[0]].concat())?;
    bench.load(&bytes)??;
    Ok(())
}

#[test]
fn any_byte_changed() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    for i in 0..bytes.len() {
        for mask in [1, 2, 4, 8, 16, 128, 255] {
            let mut changed = bytes.clone();
            changed[i] ^= mask;
            let result = bench.load(&changed)?;
            // Not seen: another version of the crate, which only an error speaks of.
            let header = String::from_utf8_lossy(&bytes[8..]);
            let version = 8 + header.find("\"crate_version\"").unwrap();
            let end = 8 + header.find("\"checkpoint\"").unwrap();
            // And blanks at the header's end.
            let blank = i >= 8 && bytes[i] == b' ';
            assert!(
                result.is_err()
                    || (version..end).contains(&i)
                    || blank
                    || sums_in_capitals(&bytes, &changed),
                "byte {i} ^ {mask}"
            );
        }
    }
    Ok(())
}

/// A hexadecimal digit is the same in capitals.
fn sums_in_capitals(bytes: &[u8], changed: &[u8]) -> bool {
    bytes.eq_ignore_ascii_case(changed)
}

/// Numbers that no training leaves, in a file that is whole.
#[test]
fn numbers_out_of_range() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    let same = |bytes: &[u8], name| with_tensor(bytes, name, |_| {});
    bench.load(&same(&bytes, "w.first_moment")?)??;
    for (name, bad) in [
        ("w.first_moment", f32::NAN),
        ("w.first_moment", f32::NEG_INFINITY),
        ("w.second_moment", f32::NAN),
        ("w.second_moment", f32::INFINITY),
        ("w.second_moment", -1e-30),
    ] {
        let changed = with_tensor(&bytes, name, |data| {
            data[4..].copy_from_slice(&bad.to_le_bytes());
        })?;
        let error = bench.refused(&changed)?.to_string();
        assert!(
            error.contains(name) && error.contains("expected finite numbers"),
            "{error}"
        );
    }
    // A flipped sign, and nothing else.
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 0x80;
    let error = bench.refused(&flipped)?.to_string();
    assert!(error.contains("\"w.second_moment\" is damaged"), "{error}");
    // Tensors of one shape in each other's place.
    let (header, data) = split(&bytes)?;
    let turned = [&data[8..], &data[..8]].concat();
    let error = bench.refused(&with_header(header, &turned))?.to_string();
    assert!(error.contains("is damaged"), "{error}");
    Ok(())
}

/// The largest counters that load can be saved again, some steps later.
#[test]
fn counters_that_load_can_be_saved() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    let with = |pointer: &'static str, value: u64| {
        edited(&bytes, |_, document| {
            set(document, pointer, Some(json!(value)));
        })
    };
    for pointer in ["/steps", "/wrapper/step"] {
        bench.load(&with(pointer, 1 << 52)?)??; // and takes a step, and saves
        for above in [(1 << 52) + 1, 1 << 53, u64::MAX] {
            let error = bench.refused(&with(pointer, above)?)?.to_string();
            assert!(
                error.contains("expected 4503599627370496 at most"),
                "{error}"
            );
        }
    }
    let rule = json!({"of_vars": {"adagc": {"z": [1.0]}}});
    let changed = edited(&bytes, |_, document| document["wrapper"]["rule"] = rule)?;
    let error = bench.refused(&changed)?.to_string();
    assert!(error.contains("it has a history of adagc"), "{error}");
    Ok(())
}

#[test]
fn header_lengths_of_any_size() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    let header = u64::from_le_bytes(*bytes.first_chunk().unwrap());
    let lengths = [
        0,
        1,
        header - 1,
        header + 1,
        bytes.len() as u64,
        100_000_000,
        100_000_001,
    ];
    for len in
        lengths
            .into_iter()
            .chain([1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX - 7, u64::MAX])
    {
        let mut changed = bytes.clone();
        changed[..8].copy_from_slice(&len.to_le_bytes());
        bench.refused(&changed)?;
    }
    Ok(())
}

#[test]
fn weights_in_place_of_a_checkpoint() -> Result<()> {
    let mut bench = Bench::new()?;
    let path = bench.folder.join("weights");
    let tensors = [("w".to_string(), bench.w.as_detached_tensor())];
    candle_core::safetensors::save(&tensors.into_iter().collect(), &path)?;
    let error = bench.refused(&fs::read(path)?)?.to_string();
    assert!(
        error.contains("weights are loaded by VarMap::load"),
        "{error}"
    );
    Ok(())
}

/// A file of format version 1, from which the fuzzer starts: it must load for ever.
#[test]
fn a_file_of_version_1() -> Result<()> {
    let seed = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../crates/candle-grad-clip/fuzz/seeds/adamw.safetensors"
    );
    let step = |opt: &mut ClippedOptimizer<AdamW>, w: &Var| opt.backward_step(&w.sqr()?.sum_all()?);
    let (same_w, mut same) = optimizer()?;
    for _ in 0..3 {
        step(&mut same, &same_w)?;
    }
    let (w, mut opt) = optimizer()?;
    opt.load(seed)?;
    w.set(&same_w)?;
    assert_eq!(opt.clip(), &Clip::norm(1.0));
    for (opt, w) in [(&mut opt, &w), (&mut same, &same_w)] {
        step(opt, w)?;
        assert_eq!(
            (opt.last_report().unwrap().step(), opt.inner().steps()),
            (5, 5)
        );
    }
    assert_eq!(w.to_vec1::<f32>()?, same_w.to_vec1::<f32>()?);
    Ok(())
}

#[derive(Debug, Clone)]
enum Mutation {
    Set(usize, u8),
    Remove(usize, usize),
    Insert(usize, Vec<u8>),
    Copy(usize, usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let pieces = prop::sample::select(vec![
        "0",
        "-",
        "e308",
        "[",
        "]",
        "{",
        "}",
        "\"",
        "\\",
        ",",
        "null",
        "18446744073709551615",
    ]);
    prop_oneof![
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (any::<usize>(), 1..20usize).prop_map(|(at, len)| Mutation::Remove(at, len)),
        (any::<usize>(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        (any::<usize>(), pieces)
            .prop_map(|(at, text)| Mutation::Insert(at, text.as_bytes().to_vec())),
        (any::<usize>(), any::<usize>(), 1..60usize)
            .prop_map(|(from, to, len)| Mutation::Copy(from, to, len)),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let len = bytes.len().max(1);
    match mutation {
        Mutation::Set(at, byte) => {
            if let Some(target) = bytes.get_mut(at % len) {
                *target = *byte;
            }
        }
        Mutation::Remove(at, count) => {
            let at = at % len;
            bytes.drain(at.min(bytes.len())..(at + count).min(bytes.len()));
        }
        Mutation::Insert(at, new) => {
            let at = (at % len).min(bytes.len());
            bytes.splice(at..at, new.iter().copied());
        }
        Mutation::Copy(from, to, count) => {
            let (from, to) = ((from % len).min(bytes.len()), (to % len).min(bytes.len()));
            let piece = bytes[from..(from + count).min(bytes.len())].to_vec();
            bytes.splice(to..to, piece);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    /// With the header's length as it was, or as it then is, so that the JSON is read.
    #[test]
    fn any_bytes_changed(mutations in prop::collection::vec(mutation(), 1..4), mend in any::<bool>()) {
        thread_local! {
            static BENCH: std::cell::RefCell<Option<Bench>> = const { std::cell::RefCell::new(None) };
        }
        BENCH.with_borrow_mut(|bench| {
            let bench = match bench {
                Some(bench) => bench,
                None => bench.insert(Bench::new().unwrap()),
            };
            let bytes = bench.bytes.clone();
            let changed = if mend {
                let (header, data) = split(&bytes).unwrap();
                let mut header = header.as_bytes().to_vec();
                for mutation in &mutations {
 mutate(&mut header, mutation);
}
                let mut changed = (header.len() as u64).to_le_bytes().to_vec();
                changed.extend(header);
                changed.extend(data);
                changed
            } else {
                let mut changed = bytes;
                for mutation in &mutations {
 mutate(&mut changed, mutation);
}
                changed
            };
            let _ = bench.load(&changed).unwrap();
        });
    }
}
