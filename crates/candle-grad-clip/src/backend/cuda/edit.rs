//! Edits all gradients of a device in one launch.

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_grad_clip_kernels::Edit;

use super::gpu::{Gpu, Kernel, launch_blocks};
use super::layout::Row;
use super::table::{Table, address, have_read, will_write};
use crate::error::Result;
use crate::tensors::by_device;

/// Edits each gradient into its target, which may be the gradient itself. All are contiguous.
pub(crate) fn edit(jobs: &[(&Tensor, &Tensor, Edit)]) -> Result<()> {
    let grads = jobs.iter().map(|(grad, ..)| Some(*grad));
    let mut tables = Vec::new();
    for (device, indices) in by_device(grads) {
        let gpu = Gpu::of(&device)?;
        let row = |&i: &usize| -> Result<Row> {
            let (grad, target, edit) = jobs[i];
            Ok(Row {
                target: address(&gpu, target)?,
                ..Row::of(&gpu, grad)?.edited(edit)
            })
        };
        gpu.function(Kernel::EDIT)?;
        let rows = indices.iter().map(row).collect::<Result<_>>()?;
        let table = Table::upload(&gpu, rows)?;
        tables.push((gpu, table, indices));
    }
    // Allocations, uploads and kernel loads of all devices come before the first write.
    for (gpu, table, indices) in tables {
        if table.chunks == 0 {
            continue;
        }
        let targets = || indices.iter().map(|&i| jobs[i].1);
        will_write(&gpu, targets())?;
        let function = gpu.function(Kernel::EDIT)?;
        let mut launch = gpu.stream.launch_builder(&function);
        launch.arg(&table.rows).arg(&table.count).arg(&table.chunk);
        // SAFETY: the arguments match the kernel's. It reads the rows' gradients and writes the
        // same number of elements to their targets. The caller holds both, and no two rows share a
        // target.
        unsafe { launch_blocks(Kernel::EDIT, &mut launch, table.chunks)? };
        will_write(&gpu, targets())?;
        have_read(&gpu, indices.iter().map(|&i| jobs[i].0))?;
    }
    Ok(())
}
