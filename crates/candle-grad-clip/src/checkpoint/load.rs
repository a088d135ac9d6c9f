//! Loading an optimizer: read the header, check everything, read the numbers into new state.

use std::path::Path;

use candle_core::{DType, Var};
use candle_grad_clip_kernels::WideVec;

use super::fault::Checked;
use super::file::{FileHeader, Place};
use super::header::{CheckpointHeader, MAX_STEPS_LOADED, Part, Parts, VarRecord, WrapperRecord};
use super::match_vars::match_vars;
use super::names::{check_names, keys};
use super::numbers::Reader;
use crate::error::{Error, Result};
use crate::optim::{Loaded, Settings};
use crate::param_state::State;
use crate::tensors::wide_dtype;

/// Reads a file for an optimizer, or for the two of a pair: the state of each, and the record of the
/// wrapper that saved it.
pub(super) fn read(path: &Path, parts: &Parts<'_>) -> Result<(Vec<Loaded>, Option<WrapperRecord>)> {
    for part in parts.iter() {
        check_names(path, part.trained.has_places_as(part.trained.vars()))?;
    }
    read_file(path, parts).map_err(|fault| fault.at(path))
}

fn read_file(path: &Path, parts: &Parts<'_>) -> Checked<(Vec<Loaded>, Option<WrapperRecord>)> {
    let (mut file, reader) = FileHeader::read(path)?;
    let mut header = CheckpointHeader::from_metadata(&file.metadata)?;
    header.check(MAX_STEPS_LOADED)?;
    let mut wrapper = header.wrapper.take();
    let records = match_vars(&header, parts)?;
    let vars = parts.vars();
    let mut places = Vec::with_capacity(vars.len());
    for (var, record) in vars.iter().zip(&records) {
        let keys = keys(record, var, header.settings_of(record));
        let place = |key: &String| file.take(key, var);
        places.push(keys.iter().map(place).collect::<Checked<Vec<Place>>>()?);
    }
    let mut of_lists = Vec::new();
    for (name, _) in wrapper.iter_mut().flat_map(WrapperRecord::lists) {
        of_lists.extend(file.take_list(name)?);
    }
    file.expect_empty()?;
    file.fill_sums(of_lists.iter_mut().chain(places.iter_mut().flatten()))?;

    let mut reader = Reader::new(reader);
    let states = read_states(&mut reader, &vars, &records, &places, header.non_finite)?;
    if let Some(wrapper) = &mut wrapper {
        for (name, list) in wrapper.lists() {
            if let Some(place) = of_lists.iter().find(|place| place.key == name) {
                *list = reader.read_list(place)?;
            }
        }
        wrapper.check_histories()?;
    }
    Ok((loaded(&header, parts, &records, states), wrapper))
}

/// What each part gets of the states, which are in the order of the parts' Vars.
fn loaded(
    header: &CheckpointHeader,
    parts: &Parts<'_>,
    records: &[&VarRecord],
    states: Vec<State>,
) -> Vec<Loaded> {
    let mut counts = records.iter().map(|of| of.count(header.steps_of(of)));
    let mut states = states.into_iter();
    let of_part = |((settings, steps, _), part): ((&Settings, u64, _), &Part<'_>)| {
        let len = part.trained.vars().vars().len();
        Loaded {
            settings: settings.clone(),
            steps,
            states: states.by_ref().take(len).collect(),
            counts: counts.by_ref().take(len).collect(),
        }
    };
    header.optimizers().zip(parts.iter()).map(of_part).collect()
}

fn read_states(
    reader: &mut Reader,
    vars: &[Var],
    records: &[&VarRecord],
    places: &[Vec<Place>],
    non_finite: bool,
) -> Checked<Vec<State>> {
    let mut states = Vec::with_capacity(vars.len());
    for ((var, record), places) in vars.iter().zip(records).zip(places) {
        states.push(if record.has_stepped {
            read_state(reader, var, places, non_finite)?
        } else {
            State::Fresh
        });
    }
    Ok(states)
}

/// Reads the state of a Var whose arrays are at `places`, to the Var's device.
fn read_state(
    reader: &mut Reader,
    var: &Var,
    places: &[Place],
    non_finite: bool,
) -> Checked<State> {
    let len = var.elem_count();
    let values = if wide_dtype(var.dtype()) == DType::F64 {
        WideVec::F64(reader.read(places, len, non_finite)?)
    } else {
        WideVec::F32(reader.read(places, len, non_finite)?)
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
