//! The trap that our report shows: candle's own llama2-c training example trains 1 of its Vars.
//!
//! `llama2_c` of candle-transformers 0.11 normalises with `RmsNorm::forward`, which has no backward
//! pass and says nothing (candle issues 3011 and 3569), so no gradient gets past the last norm.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_grad_clip::{Clip, ClippedOptimizer, StepReport};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap, loss};
use candle_transformers::models::llama2_c::{Cache, Config, Llama};

/// The layers of `Config::tiny_15m`, which the example trains, with smaller ones of each.
fn small() -> Config {
    Config {
        dim: 24,
        hidden_dim: 32,
        vocab_size: 64,
        seq_len: 16,
        ..Config::tiny_15m()
    }
}

/// One step as candle's example takes it (`candle-examples/examples/llama2-c/training.rs`), with
/// our line added. Returns how many Vars there are, and the report.
fn step(config: Config) -> Result<(usize, StepReport)> {
    let device = Device::Cpu;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let mut cache = Cache::new(false, &config, vb.pp("rot"))?;
    let (batch, length, vocab) = (2, config.seq_len, config.vocab_size);
    let model = Llama::load(vb, config)?;
    let params = ParamsAdamW::default();
    let opt = AdamW::new(varmap.all_vars(), params)?;
    let mut opt = ClippedOptimizer::wrap(opt, &varmap, Clip::norm(1.0))?;

    let tokens = Tensor::arange(0, (batch * length) as u32, &device)?;
    let inputs = tokens.reshape((batch, length))?;
    let targets = ((tokens.to_dtype(DType::F32)? + 1.0)? * 0.5)?.to_dtype(DType::U32)?;
    let logits = model.forward(&inputs, 0, &mut cache)?;
    let logits = logits.reshape((batch * length, vocab))?;
    let loss = loss::cross_entropy(&logits, &targets)?;
    Ok((opt.vars().vars().len(), opt.backward_step_report(&loss)?))
}

#[test]
fn candles_llama2_c_trains_one_of_its_vars() -> Result<()> {
    let (vars, report) = step(small())?;
    let missing = report.missing_grads();
    println!("{} of {vars} Vars got no gradient:", missing.len());
    for name in missing {
        println!("    {name}");
    }
    assert_eq!((vars, missing.len()), (59, 58));
    assert!(
        !missing.iter().any(|name| name == "lm_head.weight"),
        "the one that is trained"
    );
    for name in ["model.embed_tokens.weight", "model.norm.weight"] {
        assert!(missing.iter().any(|missing| missing == name), "{name}");
    }
    assert!(
        report.total_norm()? > 0.0,
        "so the loss goes down, and hides it"
    );
    Ok(())
}
