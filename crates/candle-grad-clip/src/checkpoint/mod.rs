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

use document::{Document, MAX_STEPS, MAX_STEPS_LOADED, VarRecord};
use file::{Arrays, Header, Place, TensorInfo};

use crate::error::{Error, Result};
use crate::optim::trained::Trained;
use crate::param_state;
use crate::param_state::State;
use crate::tensors::wide_dtype;

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
    /// The file is in place, but its folder can't be brought to the disk.
    NotDurable(io::Error),
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
            Self::NotDurable(source) => Error::CheckpointNotDurable { path, source },
            Self::Invalid(reason) => Error::Checkpoint { path, reason },
            Self::Different(differences) => Error::CheckpointMismatch { path, differences },
            Self::Other(error) => error,
        }
    }
}

/// Saves an optimizer whose Vars go by `names`, with `non_finite` also one whose state is NaN or infinite.
pub(crate) fn save(
    path: &Path,
    names: &[String],
    trained: &Trained,
    settings: &Settings,
    wrapper: Option<WrapperRecord>,
    non_finite: bool,
) -> Result<()> {
    let snapshot = trained.snapshot()?;
    let mut document = Document::new(names, trained, &snapshot, settings.clone(), wrapper);
    document.non_finite = non_finite;
    save_as(path, document, trained, &snapshot.states).map_err(|fault| fault.at(path))
}

fn save_as(
    path: &Path,
    mut document: Document,
    trained: &Trained,
    states: &[&State],
) -> Checked<()> {
    document.check(MAX_STEPS)?;
    let vars = trained.vars().vars();
    let mut tensors = Vec::new();
    let mut offset = 0;
    let mut push = |key: String, info: fn(u64, usize, &[Var]) -> TensorInfo, index: usize| {
        let info = info(offset, index, vars);
        offset = info.data_offsets.1;
        tensors.push((key, info));
    };
    // f64 first, so that every tensor is aligned to its own elements.
    let mut lists = Vec::new();
    for (name, list) in document.wrapper.iter_mut().flat_map(WrapperRecord::lists) {
        if !list.is_empty() {
            push(
                name.to_string(),
                |at, len, _| TensorInfo::list(len, at),
                list.len(),
            );
            lists.push(std::mem::take(list));
        }
    }
    let mut order: Vec<usize> = (0..vars.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(wide_dtype(vars[index].dtype()).size_in_bytes()));
    for &index in &order {
        let record = &document.vars[index];
        for key in keys(record, &vars[index], &document.optimizer) {
            push(
                key,
                |at, index, vars| TensorInfo::new(&vars[index], at),
                index,
            );
        }
    }
    let json = document.to_json()?;
    let header = file::header_bytes(&json, &tensors, &vec![0; tensors.len()])?;
    replace::replace(path, |out| {
        // The checksums are known when the numbers are written: then the header is written again.
        io::Write::write_all(out, &header)?;
        let mut writer = file::Writer {
            out: &mut *out,
            keys: tensors.iter(),
            sums: Vec::new(),
            non_finite: document.non_finite,
        };
        for list in &lists {
            writer.write(list)?;
        }
        for &index in &order {
            write_state(&mut writer, states[index], vars[index].elem_count())?;
        }
        let header = file::header_bytes(&json, &tensors, &writer.sums)?;
        io::Seek::rewind(out)?;
        Ok(io::Write::write_all(out, &header)?)
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

fn write_state<W: io::Write>(
    out: &mut file::Writer<'_, W>,
    state: &State,
    len: usize,
) -> Checked<()> {
    match state {
        State::Fresh => Ok(()),
        State::Host(values) => write_values(out, values, len),
        State::Device(arrays) => {
            for array in arrays {
                let array = array.to_device(&Device::Cpu).map_err(Error::from)?;
                write_values(out, &param_state::host_values(&[array])?, len)?;
            }
            Ok(())
        }
    }
}

fn write_values<W: io::Write>(
    out: &mut file::Writer<'_, W>,
    values: &WideVec,
    len: usize,
) -> Checked<()> {
    match values {
        WideVec::F32(values) => {
            param_state::arrays(values, len).try_for_each(|array| out.write(array))
        }
        WideVec::F64(values) => {
            param_state::arrays(values, len).try_for_each(|array| out.write(array))
        }
    }
}

/// Reads a file for an optimizer, and changes nothing.
pub(crate) fn load(path: &Path, trained: &Trained, settings: &Settings) -> Result<Loaded> {
    load_for(path, trained, settings).map_err(|fault| fault.at(path))
}

fn load_for(path: &Path, trained: &Trained, settings: &Settings) -> Checked<Loaded> {
    let (mut header, mut arrays) = Header::read(path)?;
    let mut document = Document::from_metadata(&header.metadata)?;
    document.check(MAX_STEPS_LOADED)?;
    let mut wrapper = document.wrapper.take();
    let records = document.fit(trained, settings)?;
    let vars = trained.vars().vars();
    let mut places = Vec::with_capacity(vars.len());
    for (var, record) in vars.iter().zip(&records) {
        let keys = keys(record, var, &document.optimizer);
        let place = |key: &String| header.take(key, var);
        places.push(keys.iter().map(place).collect::<Checked<Vec<Place>>>()?);
    }
    let mut of_lists = Vec::new();
    for (name, _) in wrapper.iter_mut().flat_map(WrapperRecord::lists) {
        of_lists.extend(header.take_list(name)?);
    }
    header.expect_empty()?;
    header.fill_sums(of_lists.iter_mut().chain(places.iter_mut().flatten()))?;

    let mut states = Vec::with_capacity(vars.len());
    for ((var, record), places) in vars.iter().zip(&records).zip(&places) {
        states.push(if record.has_stepped {
            read_state(&mut arrays, var, places, document.non_finite)?
        } else {
            State::Fresh
        });
    }
    for (name, list) in wrapper.iter_mut().flat_map(WrapperRecord::lists) {
        if let Some(place) = of_lists.iter().find(|place| place.key == name) {
            *list = arrays.read_list(place)?;
        }
    }
    if let Some(wrapper) = &mut wrapper {
        wrapper.check_histories()?;
        // Where the wrapper has not counted: the optimizer's own, which may have taken steps without the wrapper.
        let taken = document.steps.min(wrapper.step);
        wrapper.steps_taken.get_or_insert(taken);
    }
    Ok(Loaded {
        counts: records.iter().map(|of| of.count(document.steps)).collect(),
        steps: document.steps,
        settings: document.optimizer,
        wrapper,
        states,
    })
}

/// The state of a Var whose arrays are at `places`, kept where the Var is.
fn read_state(
    arrays: &mut Arrays,
    var: &Var,
    places: &[Place],
    non_finite: bool,
) -> Checked<State> {
    let len = var.elem_count();
    let values = if wide_dtype(var.dtype()) == DType::F64 {
        WideVec::F64(arrays.read(places, len, non_finite)?)
    } else {
        WideVec::F32(arrays.read(places, len, non_finite)?)
    };
    let state = State::Host(values);
    if var.device().is_cpu() {
        return Ok(state);
    }
    let mut moved = Vec::with_capacity(places.len());
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
            let write = |out: &mut Vec<u8>, state: &State| {
                let mut writer = file::Writer {
                    out,
                    keys: [].iter(),
                    sums: Vec::new(),
                    non_finite: false,
                };
                write_state(&mut writer, state, 6).is_ok()
            };
            let writes = write(&mut expected, &host) && write(&mut written, &State::Device(arrays));
            assert!(writes && expected == written);
            assert_eq!(written.len(), 12 * dtype.size_in_bytes());
        }
        Ok(())
    }
}
