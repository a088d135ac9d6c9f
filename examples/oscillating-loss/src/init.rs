//! Initial weights from a seed: candle's CPU generator can't be seeded.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Normal};
use rand_pcg::Pcg64;

/// A builder that fills `varmap` with weights drawn from `seed`, in the order in which they are
/// asked for, and the same on every device.
#[must_use]
pub fn seeded(varmap: &VarMap, seed: u64, device: &Device) -> VarBuilder<'static> {
    let rng = Mutex::new(Pcg64::seed_from_u64(seed));
    let backend = Seeded {
        varmap: varmap.clone(),
        rng,
    };
    VarBuilder::from_backend(Box::new(backend), DType::F32, device.clone())
}

struct Seeded {
    varmap: VarMap,
    rng: Mutex<Pcg64>,
}

impl SimpleBackend for Seeded {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let values = {
            let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
            draw(init, shape.elem_count(), &mut rng)?
        };
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)?;
        let tensor = var.as_tensor().clone();
        let mut vars = self
            .varmap
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        vars.insert(name.to_owned(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("`{name}` has no shape, so no initial weights can be drawn for it")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.varmap
            .data()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(name)
    }
}

fn draw(init: Init, count: usize, rng: &mut Pcg64) -> Result<Vec<f32>> {
    let values = 0..count;
    Ok(match init {
        Init::Const(value) => vec![value as f32; count],
        Init::Uniform { lo, up } => values.map(|_| rng.random_range(lo..up) as f32).collect(),
        Init::Randn { mean, stdev } => {
            let normal = Normal::new(mean, stdev).map_err(candle_core::Error::wrap)?;
            values.map(|_| normal.sample(rng) as f32).collect()
        }
        Init::Kaiming { .. } => bail!("this model names its initial weights itself"),
    })
}
