//! Any bytes as a checkpoint: no panic, no partial load.
#![no_main]

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Var};
use candle_grad_clip::optim::AdamW;
use candle_grad_clip::{Clip, ClippedOptimizer};
use candle_nn::{Optimizer, ParamsAdamW};
use libfuzzer_sys::fuzz_target;

struct Bench {
    w: Var,
    opt: ClippedOptimizer<AdamW>,
    /// What the optimizer is.
    state: Vec<u8>,
}

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

/// A file of this process, in memory where that can be.
fn file(name: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() {
        memory.to_path_buf()
    } else {
        std::env::temp_dir()
    };
    folder.join(format!("candle-grad-clip-fuzz-{}-{name}", std::process::id()))
}

fn saved(opt: &ClippedOptimizer<AdamW>) -> Vec<u8> {
    opt.save(file("saved")).unwrap();
    fs::read(file("saved")).unwrap()
}

fn step(opt: &mut ClippedOptimizer<AdamW>, w: &Var) -> candle_core::Result<()> {
    opt.backward_step(&w.sqr()?.sum_all()?)
}

impl Bench {
    /// The Vars of the seed.
    fn new() -> Self {
        let w = Var::new(&[3f32, 4.0], &Device::Cpu).unwrap();
        let x = Var::zeros(1, DType::F64, &Device::Cpu).unwrap();
        let vars = vec![("w".to_string(), w.clone()), ("x".to_string(), x)];
        let opt = AdamW::from_named_vars(vars.clone(), ParamsAdamW::default()).unwrap();
        let mut opt = ClippedOptimizer::wrap(opt, vars, Clip::norm(1.0)).unwrap();
        step(&mut opt, &w).unwrap();
        let state = saved(&opt);
        Self { w, opt, state }
    }

    fn load(&mut self, bytes: &[u8]) {
        fs::write(file("hostile"), bytes).unwrap();
        if self.opt.load(file("hostile")).is_ok() {
            let _ = step(&mut self.opt, &self.w);
            *self = Self::new();
        }
        assert_eq!(saved(&self.opt), self.state);
    }
}

fuzz_target!(|bytes: &[u8]| {
    BENCH.with_borrow_mut(|bench| {
        let bench = bench.get_or_insert_with(Bench::new);
        bench.load(bytes);
        // As a header of the right length, behind which the numbers of the seed follow.
        let Some((_, header)) = bytes.split_at_checked(8) else {
            return;
        };
        let data_bytes = header.len().min(16);
        let (header, data) = header.split_at(header.len() - data_bytes);
        let mut mended = (header.len() as u64).to_le_bytes().to_vec();
        mended.extend(header);
        mended.extend(data);
        bench.load(&mended);
    });
});
