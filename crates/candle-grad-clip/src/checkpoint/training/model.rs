//! `model.safetensors`: the Vars by name, as `VarMap::save` writes them.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};
use safetensors::View;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::folder::create_file;
use crate::checkpoint::fault::{Checked, Fault};
use crate::checkpoint::file::{BUFFER_BYTES, with_prefix};
use crate::checkpoint::header::VarRecord;
use crate::checkpoint::match_vars::match_records;
use crate::checkpoint::names::check_names;
use crate::error::{Error, Result};
use crate::vars::NamedVars;

/// Writes a new file.
pub(super) fn save(path: &Path, vars: &NamedVars) -> Result<()> {
    vars.check_names()?;
    check_names(path, vars.has_places)?;
    create_file(path, &mut |out| write(out, vars)).map_err(|fault| fault.at(path))
}

fn write(out: &mut BufWriter<File>, vars: &NamedVars) -> Checked<()> {
    let mut order: Vec<(&String, &Var)> = vars.names().iter().zip(vars.vars()).collect();
    // Like VarMap::save: large elements first, so that every tensor is aligned to its own.
    order.sort_by_key(|(name, var)| (Reverse(Dtype::from(var.dtype())), *name));
    let mut infos = Vec::with_capacity(order.len());
    let mut end = 0;
    for (name, var) in &order {
        let start = end;
        end += var.elem_count() * var.dtype().size_in_bytes();
        let info = TensorInfo {
            dtype: var.dtype().into(),
            shape: var.dims().to_vec(),
            data_offsets: (start, end),
        };
        infos.push(((*name).clone(), info));
    }
    let count = infos.len();
    let header = Metadata::new(None, infos).map_err(|error| Fault::Invalid(error.to_string()))?;
    out.write_all(&with_prefix(&header, count)?)?;
    for (name, var) in order {
        let dtype = var.dtype();
        if matches!(
            dtype,
            DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0
        ) {
            let dtype = dtype.as_str();
            return Err(Fault::Invalid(format!(
                "{name:?} is {dtype}, which candle can't save"
            )));
        }
        let tensor = var.as_detached_tensor();
        let tensor = &tensor.to_device(&Device::Cpu).map_err(Error::from)?;
        let bytes: Cow<'_, [u8]> = tensor.data();
        if has_nan(&bytes, dtype) {
            return Err(Fault::Invalid(format!(
                "nothing was saved, since the weights are ruined: {name:?} has NaN; go back to an earlier checkpoint"
            )));
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

fn has_nan(bytes: &[u8], dtype: DType) -> bool {
    fn any<const N: usize>(bytes: &[u8], is_nan: impl Fn([u8; N]) -> bool) -> bool {
        // Without an early exit, which makes the loop fast.
        let (elements, _) = bytes.as_chunks::<N>();
        elements
            .iter()
            .fold(false, |any, element| any | is_nan(*element))
    }
    match dtype {
        DType::F64 => any(bytes, |element| f64::from_ne_bytes(element).is_nan()),
        DType::F32 => any(bytes, |element| f32::from_ne_bytes(element).is_nan()),
        DType::F16 => any(bytes, |element| f16::from_ne_bytes(element).is_nan()),
        DType::BF16 => any(bytes, |element| bf16::from_ne_bytes(element).is_nan()),
        _ => false,
    }
}

/// Reads new values for these Vars, on their devices, and checks that they fit.
pub(super) fn read(path: &Path, vars: &NamedVars) -> Result<Vec<(Var, Tensor)>> {
    vars.check_names()?;
    check_names(path, vars.has_places)?;
    read_file(path, vars).map_err(|fault| fault.at(path))
}

fn read_file(path: &Path, vars: &NamedVars) -> Checked<Vec<(Var, Tensor)>> {
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, File::open(path)?);
    let mut prefix = [0; 8];
    reader.read_exact(&mut prefix)?;
    let mut json = Vec::new();
    let header_bytes = u64::from_le_bytes(prefix);
    reader.by_ref().take(header_bytes).read_to_end(&mut json)?;
    let unreadable = |error: &dyn std::fmt::Display| {
        Fault::Invalid(format!("its header can't be read: {error}"))
    };
    let header: Metadata = serde_json::from_slice(&json).map_err(|error| unreadable(&error))?;
    let mut records = Vec::new();
    let mut dtypes = Vec::new();
    let names = header.offset_keys();
    for info in names.iter().filter_map(|name| header.info(name)) {
        let dtype = DType::try_from(info.dtype).map_err(|error| unreadable(&error))?;
        let name = names[records.len()].clone();
        records.push(VarRecord::fresh(name, info.shape.clone(), dtype.as_str()));
        dtypes.push(dtype);
    }
    match_records(&records, vars, Vec::new())?;
    // In the order of the file.
    let mut values = Vec::with_capacity(records.len());
    let by_name: HashMap<&String, &Var> = vars.names().iter().zip(vars.vars()).collect();
    for (name, dtype) in names.iter().zip(dtypes) {
        let var = by_name[name];
        let mut bytes = vec![0; var.elem_count() * dtype.size_in_bytes()];
        reader.read_exact(&mut bytes)?;
        let tensor = Tensor::from_raw_buffer(&bytes, dtype, var.dims(), var.device());
        values.push((var.clone(), tensor.map_err(Error::from)?));
    }
    Ok(values)
}
