//! A fused optimizer step that the host has decided: one launch updates all Vars of a device.

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, PushKernelArg};
use candle_grad_clip_kernels::MAX_MOMENTS;

use super::gpu::{Gpu, Kernel, failed, launch_blocks};
use super::layout::{Decided, IS_FIRST, Row, RuleNumbers};
use super::table::{Table, address, have_read, will_write};
use crate::backend::device_steps::UpdateJob;
use crate::error::Result;
use crate::param_state::{State, StepRule};
use crate::tensors::by_device;

impl UpdateJob<'_> {
    pub(super) fn row(&self, gpu: &Gpu) -> Result<Row> {
        let State::Device(arrays) = self.state else {
            return Err(
                candle_core::Error::msg("expected an optimizer state on the Var's device").into(),
            );
        };
        let mut row = Row::of(gpu, self.grad)?.edited(self.edit);
        row.target = address(gpu, self.var)?;
        let (moments, master) = arrays.split_at(self.layout.moments.min(arrays.len()));
        for (to, array) in row.moments.iter_mut().zip(moments.iter().take(MAX_MOMENTS)) {
            *to = address(gpu, array)?;
        }
        if let Some(master) = master.first() {
            row.master = address(gpu, master)?;
        }
        if self.is_first {
            row.flags |= IS_FIRST;
        }
        row.rule = self.rule as u32;
        row.state = self.index as u32;
        Ok(row)
    }

    /// The tensors that the update writes.
    pub(super) fn written(&self) -> impl Iterator<Item = &Tensor> {
        let arrays = match self.state {
            State::Device(arrays) => &arrays[..],
            _ => &[],
        };
        std::iter::once(self.var.as_tensor()).chain(arrays)
    }
}

/// Runs all jobs. `rules` must not be empty.
pub(crate) fn update(jobs: &[UpdateJob<'_>], rules: &[StepRule]) -> Result<()> {
    let grads = jobs.iter().map(|job| Some(job.grad));
    let mut tables = Vec::new();
    for (device, indices) in by_device(grads) {
        let gpu = Gpu::of(&device)?;
        gpu.function(kernel_of(rules))?;
        let rows = indices.iter().map(|&i| jobs[i].row(&gpu));
        let table = Table::upload(&gpu, rows.collect::<Result<_>>()?)?;
        let numbers = upload_rules(&gpu, rules)?;
        tables.push((gpu, table, numbers, indices));
    }
    // Allocations, uploads and kernel loads of all devices come before the first write.
    for (gpu, table, numbers, indices) in tables {
        let jobs = || indices.iter().map(|&i| &jobs[i]);
        launch_update(
            &gpu,
            &table,
            kernel_of(rules),
            &numbers,
            Decided::default(),
            jobs,
        )?;
    }
    Ok(())
}

pub(super) fn kernel_of(rules: &[StepRule]) -> Kernel {
    match rules.first() {
        Some(StepRule::Sgd(_)) => Kernel::SGD,
        Some(StepRule::AdamW(_)) | None => Kernel::ADAMW,
    }
}

pub(super) fn upload_rules(gpu: &Gpu, rules: &[StepRule]) -> Result<CudaSlice<RuleNumbers>> {
    let numbers: Vec<RuleNumbers> = rules.iter().map(|rule| (*rule).into()).collect();
    let uploaded = gpu.stream.clone_htod(&numbers);
    uploaded.map_err(|e| failed("upload", e))
}

pub(super) fn launch_update<'a, I: Iterator<Item = &'a UpdateJob<'a>>>(
    gpu: &Gpu,
    table: &Table,
    kernel: Kernel,
    rules: &CudaSlice<RuleNumbers>,
    decided: Decided,
    jobs: impl Fn() -> I,
) -> Result<()> {
    if table.chunks == 0 {
        return Ok(());
    }
    will_write(gpu, jobs().flat_map(UpdateJob::written))?;
    let function = gpu.function(kernel)?;
    let mut launch = gpu.stream.launch_builder(&function);
    launch.arg(&table.rows).arg(&table.count).arg(&table.chunk);
    launch.arg(rules).arg(&decided);
    // SAFETY: the arguments match the kernel's. It writes the Vars and states of the jobs, each in
    // one row only, and reads their gradients, which share no storage with them. The caller holds
    // all.
    unsafe { launch_blocks(kernel, &mut launch, table.chunks)? };
    will_write(gpu, jobs().flat_map(UpdateJob::written))?;
    have_read(gpu, jobs().map(|job| job.grad))
}
