//! Checkpoints: the state of an optimizer, its hyper-parameters and its clipping, in one safetensors file.
//!
//! Tensors are named `<Var>.<array>` (see [`Settings::moments`], and `<Var>.master`) and shaped as their Var is. As no array's
//! name has a dot, no two Vars of different names have a tensor of one name. What the tensors are is said by a [`Document`]
//! in the file's metadata. Loading takes three steps: read the header, check everything, read the numbers into new
//! state. Only then, and without anything that could fail, the caller puts it in place.

mod document;
mod file;
mod replace;
mod settings;

use std::io;
use std::path::Path;

use candle_core::{DType, Device, Var};
use candle_grad_clip_kernels::WideVec;

use crate::optim::state::{self, State, wide_dtype};
use crate::optim::trained::Trained;
use crate::{Error, Result};
use document::{Document, VarRecord};
use file::{Arrays, Header, TensorInfo};

pub(crate) use document::WrapperRecord;
pub(crate) use settings::{AdamWSettings, Settings, SgdSettings};

/// The name of a master copy.
const MASTER: &str = "master";

/// What an optimizer takes on from a file.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) settings: Settings,
    pub(crate) steps: u64,
    /// One for each of the optimizer's Vars.
    pub(crate) states: Vec<State>,
    /// The steps that each of them has taken.
    pub(crate) counts: Vec<u64>,
    /// Of a file that a wrapper saved.
    pub(crate) wrapper: Option<WrapperRecord>,
}

type Checked<T> = std::result::Result<T, Fault>;

/// What went wrong, before it is known with which file.
#[derive(Debug)]
enum Fault {
    Io(io::Error),
    /// The file, or what is to be saved, is not as it must be.
    Invalid(String),
    /// The file fits another optimizer.
    Different(Vec<String>),
    /// A device.
    Other(Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl Fault {
    fn at(self, path: &Path) -> Error {
        let path = path.to_path_buf();
        match self {
            Self::Io(source) => Error::CheckpointIo { path, source },
            Self::Invalid(reason) => Error::Checkpoint { path, reason },
            Self::Different(differences) => Error::CheckpointMismatch { path, differences },
            Self::Other(error) => error,
        }
    }
}

/// Saves an optimizer whose Vars go by `names`.
pub(crate) fn save(
    path: &Path,
    names: &[String],
    trained: &Trained,
    settings: &Settings,
    wrapper: Option<WrapperRecord>,
) -> Result<()> {
    let snapshot = trained.snapshot()?;
    let document = Document::new(names, trained, &snapshot, settings.clone(), wrapper);
    save_as(path, &document, trained, &snapshot.states).map_err(|fault| fault.at(path))
}

fn save_as(path: &Path, document: &Document, trained: &Trained, states: &[&State]) -> Checked<()> {
    document.check()?;
    let vars = trained.vars().vars();
    // f64 first, so that every tensor is aligned to its own elements.
    let mut order: Vec<usize> = (0..vars.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(wide_dtype(vars[index].dtype()).size_in_bytes()));
    let mut tensors = Vec::new();
    let mut offset = 0;
    for &index in &order {
        let record = &document.vars[index];
        for key in keys(record, &vars[index], &document.optimizer) {
            let info = TensorInfo::new(&vars[index], offset);
            offset = info.data_offsets.1;
            tensors.push((key, info));
        }
    }
    let header = file::header_bytes(&document.to_json()?, &tensors)?;
    replace::replace(path, |out| {
        io::Write::write_all(out, &header)?;
        for &index in &order {
            write_state(out, states[index], vars[index].elem_count())?;
        }
        Ok(())
    })
}

/// The names of the tensors of a Var, in the order in which its arrays are kept.
fn keys(record: &VarRecord, var: &Var, settings: &Settings) -> Vec<String> {
    if !record.has_stepped {
        return Vec::new();
    }
    let master = settings.kept().has_master(var.dtype()).then_some(MASTER);
    let arrays = settings.moments().iter().copied().chain(master);
    arrays
        .map(|array| format!("{}.{array}", record.name))
        .collect()
}

fn write_state(out: &mut dyn io::Write, state: &State, len: usize) -> Checked<()> {
    match state {
        State::Fresh => Ok(()),
        State::Host(values) => Ok(write_values(out, values, len)?),
        State::Device(arrays) => {
            for array in arrays {
                let array = array.to_device(&Device::Cpu).map_err(Error::from)?;
                write_values(out, &state::host_values(&[array])?, len)?;
            }
            Ok(())
        }
    }
}

fn write_values(out: &mut dyn io::Write, values: &WideVec, len: usize) -> io::Result<()> {
    match values {
        WideVec::F32(values) => {
            state::arrays(values, len).try_for_each(|array| file::write_numbers(out, array))
        }
        WideVec::F64(values) => {
            state::arrays(values, len).try_for_each(|array| file::write_numbers(out, array))
        }
    }
}

/// Reads a file for an optimizer, and changes nothing.
pub(crate) fn load(path: &Path, trained: &Trained, settings: &Settings) -> Result<Loaded> {
    load_for(path, trained, settings).map_err(|fault| fault.at(path))
}

fn load_for(path: &Path, trained: &Trained, settings: &Settings) -> Checked<Loaded> {
    let (mut header, mut arrays) = Header::read(path)?;
    let document = Document::from_metadata(&header.metadata)?;
    document.check()?;
    let records = document.fit(trained, settings)?;
    let vars = trained.vars().vars();
    let mut offsets = Vec::with_capacity(vars.len());
    for (var, record) in vars.iter().zip(&records) {
        let keys = keys(record, var, &document.optimizer);
        let offset = |key: &String| header.take(key, var);
        offsets.push(keys.iter().map(offset).collect::<Checked<Vec<u64>>>()?);
    }
    header.expect_empty()?;

    let mut states = Vec::with_capacity(vars.len());
    for ((var, record), offsets) in vars.iter().zip(&records).zip(&offsets) {
        states.push(if record.has_stepped {
            read_state(&mut arrays, var, offsets)?
        } else {
            State::Fresh
        });
    }
    Ok(Loaded {
        counts: records.iter().map(|of| of.count(document.steps)).collect(),
        steps: document.steps,
        settings: document.optimizer,
        wrapper: document.wrapper,
        states,
    })
}

/// The state of a Var whose arrays begin at `offsets`, kept where the Var is.
fn read_state(arrays: &mut Arrays, var: &Var, offsets: &[u64]) -> Checked<State> {
    let len = var.elem_count();
    let values = if wide_dtype(var.dtype()) == DType::F64 {
        WideVec::F64(arrays.read(offsets, len)?)
    } else {
        WideVec::F32(arrays.read(offsets, len)?)
    };
    let state = State::Host(values);
    if var.device().is_cpu() {
        return Ok(state);
    }
    let mut moved = Vec::with_capacity(offsets.len());
    for array in state.to_tensors(var)? {
        moved.push(array.to_device(var.device()).map_err(Error::from)?);
    }
    Ok(State::Device(moved))
}

/// Names for an error: ten of them, and how many more.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As far as it goes without another device.
    #[test]
    fn state_on_a_device_is_written_as_state_on_the_host() -> anyhow::Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let var = Var::zeros((2, 3), dtype, &Device::Cpu)?;
            let arrays = [0.1, -7.0].map(|x| var.as_detached_tensor().affine(1.0, x));
            let arrays: Vec<_> = arrays.into_iter().collect::<candle_core::Result<_>>()?;
            let host = State::from_tensors(&var, arrays.clone())?;
            let (mut expected, mut written) = (Vec::new(), Vec::new());
            let writes = write_state(&mut expected, &host, 6).is_ok()
                && write_state(&mut written, &State::Device(arrays), 6).is_ok();
            assert!(writes && expected == written);
            assert_eq!(written.len(), 12 * dtype.size_in_bytes());
        }
        Ok(())
    }
}
