//! Saving an optimizer.

use std::cmp::Reverse;
use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::Path;

use candle_core::{Device, Var};
use candle_grad_clip_kernels::WideVec;
use safetensors::tensor::TensorInfo;

use super::fault::Checked;
use super::file::{array_info, header_bytes, list_info};
use super::header::{CheckpointHeader, MAX_STEPS, Part, Parts, WrapperRecord};
use super::names::{check_names, keys};
use super::numbers::Writer;
use crate::error::{Error, Result};
use crate::optim::Snapshot;
use crate::param_state::{self, State};
use crate::tensors::wide_dtype;
use crate::vars::NamedVars;

/// Makes a file at a path: the second argument writes it.
pub(super) type MakeFile =
    fn(&Path, &mut dyn FnMut(&mut BufWriter<File>) -> Checked<()>) -> Checked<()>;

/// What a file holds.
pub(super) struct Contents<'a> {
    pub(super) parts: Parts<'a>,
    /// The names of the Vars, and the wrapper's own state.
    pub(super) wrapper: Option<(&'a NamedVars, WrapperRecord)>,
    /// Whether the state may be NaN or infinite.
    pub(super) non_finite: bool,
}

/// Saves an optimizer with its state, under its Vars' own names or the wrapper's.
pub(super) fn save(path: &Path, contents: Contents<'_>, make_file: MakeFile) -> Result<()> {
    let Contents {
        parts,
        wrapper,
        non_finite,
    } = contents;
    let of_wrapper = wrapper.as_ref().map(|(vars, _)| *vars);
    let header_of = |part: &Part<'_>, snapshot: &Snapshot<'_>| -> Result<CheckpointHeader> {
        let named_by = of_wrapper.unwrap_or(part.trained.vars());
        check_names(path, part.trained.has_places_as(named_by))?;
        let names = part.trained.names_as(named_by);
        Ok(CheckpointHeader::new(&names, part, snapshot))
    };
    let first = parts.first.trained.snapshot()?;
    let mut header = header_of(&parts.first, &first)?;
    let mut states = first.states;
    if let Some(part) = &parts.second {
        let second = part.trained.snapshot()?;
        header.add_second(header_of(part, &second)?);
        states.extend(second.states);
    }
    header.wrapper = wrapper.map(|(_, record)| record);
    header.non_finite = non_finite;
    save_as(path, header, &parts.vars(), &states, make_file).map_err(|fault| fault.at(path))
}

fn save_as(
    path: &Path,
    mut header: CheckpointHeader,
    vars: &[Var],
    states: &[&State],
    make_file: MakeFile,
) -> Checked<()> {
    header.check(MAX_STEPS)?;
    let lists = take_lists(&mut header);
    // f64 first, so that every tensor is aligned to its own elements.
    let mut order: Vec<usize> = (0..vars.len()).collect();
    order.sort_by_key(|&index| Reverse(wide_dtype(vars[index].dtype()).size_in_bytes()));
    let tensors = layout(&header, vars, &lists, &order);
    let json = header.to_json()?;
    let placeholder = header_bytes(&json, &tensors, &vec![0; tensors.len()])?;
    make_file(path, &mut |out| {
        // The checksums are known only after the numbers are written. Then the header is
        // overwritten.
        out.write_all(&placeholder)?;
        let mut writer = Writer {
            out: &mut *out,
            keys: tensors.iter(),
            sums: Vec::new(),
            non_finite: header.non_finite,
        };
        for (_, list) in &lists {
            writer.write(list)?;
        }
        for &index in &order {
            write_state(&mut writer, states[index], vars[index].elem_count())?;
        }
        let bytes = header_bytes(&json, &tensors, &writer.sums)?;
        out.rewind()?;
        Ok(out.write_all(&bytes)?)
    })
}

/// Takes the wrapper's non-empty lists, which become arrays in the file.
fn take_lists(header: &mut CheckpointHeader) -> Vec<(&'static str, Vec<f64>)> {
    let lists = header.wrapper.iter_mut().flat_map(WrapperRecord::lists);
    let lists = lists.map(|(name, list)| (name, std::mem::take(list)));
    lists.filter(|(_, list)| !list.is_empty()).collect()
}

/// The tensors of the file, one after the other: the lists, then the arrays of the Vars in this
/// order.
fn layout(
    header: &CheckpointHeader,
    vars: &[Var],
    lists: &[(&'static str, Vec<f64>)],
    order: &[usize],
) -> Vec<(String, TensorInfo)> {
    let mut tensors = Vec::new();
    let end = |tensors: &Vec<(String, TensorInfo)>| {
        tensors.last().map_or(0, |(_, info)| info.data_offsets.1)
    };
    for (name, list) in lists {
        let info = list_info(list.len(), end(&tensors));
        tensors.push(((*name).to_string(), info));
    }
    for &index in order {
        let record = &header.vars[index];
        for key in keys(record, &vars[index], header.settings_of(record)) {
            let info = array_info(&vars[index], end(&tensors));
            tensors.push((key, info));
        }
    }
    tensors
}

fn write_state<W: Write>(out: &mut Writer<'_, W>, state: &State, len: usize) -> Checked<()> {
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

fn write_values<W: Write>(out: &mut Writer<'_, W>, values: &WideVec, len: usize) -> Checked<()> {
    match values {
        WideVec::F32(values) => {
            param_state::arrays(values, len).try_for_each(|array| out.write(array))
        }
        WideVec::F64(values) => {
            param_state::arrays(values, len).try_for_each(|array| out.write(array))
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    /// With tensors on CPU, as there may be no other device.
    #[test]
    fn state_on_a_device_is_written_as_state_on_the_host() -> anyhow::Result<()> {
        for dtype in [DType::F32, DType::F64] {
            let var = Var::zeros((2, 3), dtype, &Device::Cpu)?;
            let arrays = [0.1, -7.0].map(|x| var.as_detached_tensor().affine(1.0, x));
            let arrays: Vec<_> = arrays.into_iter().collect::<candle_core::Result<_>>()?;
            let host = State::from_tensors(&var, arrays.clone())?;
            let (mut expected, mut written) = (Vec::new(), Vec::new());
            let write = |out: &mut Vec<u8>, state: &State| {
                let mut writer = Writer {
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
