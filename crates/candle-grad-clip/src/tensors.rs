//! Storage addresses of tensors, tensors by device, and dtype support of devices.

use candle_core::{DType, Device, Storage, Tensor, Var};

use crate::threads::{MANY_VARS, Work, for_each};

/// The address of a tensor's storage: equal for tensors that share it.
#[inline]
pub(crate) fn storage_address(tensor: &Tensor) -> usize {
    let (storage, _) = tensor.storage_and_layout();
    std::ptr::from_ref::<Storage>(&storage).addr()
}

/// The storage addresses of some Vars.
pub(crate) fn storage_addresses(vars: &[Var], work: Work) -> Vec<usize> {
    let mut addresses = vec![0; vars.len()];
    let fill = |(vars, addresses): (&[Var], &mut [usize])| {
        for (var, address) in vars.iter().zip(addresses) {
            *address = storage_address(var);
        }
        Ok(())
    };
    let tasks = vars.chunks(MANY_VARS).zip(addresses.chunks_mut(MANY_VARS));
    if for_each(work, tasks, fill).is_err() {
        return vars.iter().map(|var| storage_address(var)).collect(); // the system can't create threads
    }
    addresses
}

/// The indices of the tensors on each device; `None` entries are left out.
pub(crate) fn by_device<'t>(
    tensors: impl Iterator<Item = Option<&'t Tensor>>,
) -> Vec<(Device, Vec<usize>)> {
    let mut devices: Vec<(Device, Vec<usize>)> = Vec::new();
    for (index, tensor) in tensors.enumerate() {
        let Some(tensor) = tensor else { continue };
        let device = tensor.device();
        let known = devices
            .iter_mut()
            .find(|(other, _)| other.same_device(device));
        match known {
            Some((_, indices)) => indices.push(index),
            None => devices.push((device.clone(), vec![index])),
        }
    }
    devices
}

/// Reads the headers of some tensors, so that their cache misses overlap.
#[inline]
pub(crate) fn touch_headers<'a>(tensors: impl Iterator<Item = &'a Tensor>) {
    let sum = |values: &[usize]| values.iter().fold(0usize, |sum, x| sum.wrapping_add(*x));
    let layout = |tensor: &Tensor| sum(tensor.dims()).wrapping_add(sum(tensor.stride()));
    std::hint::black_box(tensors.map(layout).fold(0, usize::wrapping_add));
}

/// Whether any two of up to `len` addresses are equal, or one is 0.
///
/// Uses a table of twice that size with linear probing: a hash set takes four times as long, which
/// matters with many small gradients.
pub(crate) fn any_equal(len: usize, addresses: impl IntoIterator<Item = usize>) -> bool {
    let bits = (2 * len + 1).next_power_of_two().ilog2();
    let mut table = vec![0; 1 << bits];
    addresses.into_iter().any(|address| {
        let hash = (address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15); // 2^64 / golden ratio
        let mut slot = (hash >> (u64::BITS - bits)) as usize;
        while table[slot] != 0 && table[slot] != address {
            slot = (slot + 1) & (table.len() - 1);
        }
        std::mem::replace(&mut table[slot], address) == address
    })
}

/// Whether a device supports a dtype: Metal has no f64.
#[inline]
pub(crate) fn device_has(dtype: DType, is_metal: impl FnOnce() -> bool) -> bool {
    dtype != DType::F64 || !is_metal()
}

/// The dtype of a Var's optimizer state: f64 for f64, else f32.
#[inline]
pub(crate) fn wide_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::{any_equal, device_has};

    #[test]
    fn equal_addresses_are_found_wherever_they_are() {
        for len in [0, 1, 2, 30, 1000] {
            let addresses: Vec<usize> = (1..=len).map(|i| 0x7f00_0000_0000 + 16 * i).collect();
            assert!(!any_equal(len, addresses.iter().copied()), "{len}");
            for i in 1..len {
                let mut repeated = addresses.clone();
                repeated[i] = addresses[i / 2];
                assert!(any_equal(len, repeated), "{i} of {len}");
            }
        }
    }

    #[test]
    fn only_f64_on_metal_is_missing() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            assert!(device_has(dtype, || false), "{dtype:?}");
            assert_eq!(device_has(dtype, || true), dtype != DType::F64, "{dtype:?}");
        }
    }
}
