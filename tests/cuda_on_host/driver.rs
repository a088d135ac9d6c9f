//! What runs and what is found by the driver, by the kernels of `ci/cuda-on-host/selftest.cu`.

use anyhow::{Result, bail};
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, DevicePtrMut, DriverError, HostSlice, LaunchConfig, PushKernelArg, result,
};
use candle_core::{CudaDevice, Device};
use support::cuda_on_host::Driver;

pub(super) fn device() -> Result<CudaDevice> {
    Ok(Device::new_cuda(0)?.as_cuda_device()?.clone())
}

pub(super) const fn launch(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// The text of the error of a launch, or of waiting for it.
fn fault(device: &CudaDevice, launched: Result<(), DriverError>) -> Result<String> {
    match launched.and_then(|()| device.cuda_stream().synchronize()) {
        Ok(()) => bail!("the launch went well"),
        Err(error) => Ok(format!("{error:?}")),
    }
}

pub(super) fn uninitialized<T: candle_core::cuda_backend::cudarc::driver::DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    // SAFETY: what is read of it is what the driver filled it with.
    Ok(unsafe { device.alloc(len) }?)
}

#[test]
fn blocks_threads_and_warps_work_together_in_any_order() -> Result<()> {
    let driver = Driver::lock();
    let device = device()?;
    let values: Vec<f32> = (0..10_000u16).map(|i| f32::from(i % 7)).collect();
    let expected: f32 = values.iter().sum(); // exact: small integers
    let input = device.clone_htod(&values)?;
    for seed in 0..20 {
        driver.seed(seed);
        let mut blocks = uninitialized::<f32>(&device, 5)?;
        let mut arrived = device.clone_htod(&[0u32])?;
        let mut out = uninitialized::<f32>(&device, 1)?;
        let n = values.len() as u32;
        launch!(
            device,
            "selftest_sum",
            launch(5, 96),
            &input,
            &n,
            &mut blocks,
            &mut arrived,
            &mut out,
        )?;
        assert_eq!(device.clone_dtoh(&out)?, [expected], "seed {seed}");
        assert_eq!(device.clone_dtoh(&arrived)?, [0]);
    }
    Ok(())
}

#[test]
fn shared_memory_by_the_launch_and_ballots() -> Result<()> {
    let _driver = Driver::lock();
    let device = device()?;
    let values: Vec<f32> = (0..70u8).map(f32::from).collect();
    let mut data = device.clone_htod(&values)?;
    let config = LaunchConfig {
        shared_mem_bytes: 70 * 4,
        ..launch(1, 70)
    };
    launch!(device, "selftest_reverse", config, &mut data)?;
    let reversed: Vec<f32> = values.into_iter().rev().collect();
    assert_eq!(device.clone_dtoh(&data)?, reversed);

    // The second warp has 8 lanes, the first of which is thread 32.
    let mut out = uninitialized::<u32>(&device, 40)?;
    launch!(device, "selftest_ballot", launch(1, 40), &mut out)?;
    let bits = |first: u32, lanes: u32| {
        let set = (0..lanes).filter(|lane| u32::is_multiple_of(first + lane, 3));
        set.map(|lane| 1 << lane).sum::<u32>()
    };
    let out = device.clone_dtoh(&out)?;
    assert!(out[..32].iter().all(|mask| *mask == bits(0, 32)));
    assert!(out[32..].iter().all(|mask| *mask == bits(32, 8)));
    Ok(())
}

#[test]
fn what_was_never_written_is_nan() -> Result<()> {
    let _driver = Driver::lock();
    let device = device()?;
    let memory = device.clone_dtoh(&uninitialized::<f32>(&device, 10)?)?;
    assert!(memory.iter().all(|x| x.is_nan()));

    let mut out = uninitialized::<f32>(&device, 64)?;
    launch!(device, "selftest_missing_barrier", launch(1, 64), &mut out)?;
    let out = device.clone_dtoh(&out)?;
    assert!(
        out.contains(&1.0) && out.iter().any(|x| x.is_nan()),
        "{out:?}"
    );

    let mut out = uninitialized::<f32>(&device, 16)?;
    launch!(
        device,
        "selftest_shuffle_with_exited",
        launch(1, 32),
        &mut out
    )?;
    assert!(device.clone_dtoh(&out)?.iter().all(|x| x.is_nan()));
    Ok(())
}

#[test]
fn faults_of_kernels_are_errors() -> Result<()> {
    let _driver = Driver::lock();
    let device = device()?;
    let mut out = uninitialized::<f32>(&device, 32)?;

    let error = fault(
        &device,
        launch!(device, "selftest_two_barriers", launch(1, 32), &mut out),
    )?;
    assert!(
        error.contains("selftest_two_barriers: block (0, 0, 0): threads wait for each other"),
        "{error}"
    );
    let error = fault(
        &device,
        launch!(device, "selftest_lonely_shuffle", launch(1, 32), &mut out),
    )?;
    assert!(
        error.contains("threads wait for each other: (0, 0, 0) at selftest.cu"),
        "{error}"
    );
    let error = fault(
        &device,
        launch!(
            device,
            "selftest_missing_barrier",
            launch(1, 2000),
            &mut out
        ),
    )?;
    assert!(error.contains("is impossible"), "{error}");

    if std::env::var_os("CUDA_ON_HOST_SANITIZE").is_some() {
        return Ok(()); // AddressSanitizer ends the process
    }
    let error = fault(
        &device,
        launch!(device, "selftest_out_of_bounds", launch(1, 32), &mut out),
    )?;
    assert!(
        error.contains("a write out of bounds of device memory"),
        "{error}"
    );
    launch!(device, "selftest_missing_barrier", launch(1, 32), &mut out)?;
    Ok(())
}

#[test]
fn counts_and_failures() -> Result<()> {
    let driver = Driver::lock();
    let device = device()?;
    driver.reset_counts();
    let live = driver.count(c"live_bytes");
    let mut out = device.clone_htod(&[0f32; 64])?;
    launch!(device, "selftest_missing_barrier", launch(1, 64), &mut out)?;
    launch!(device, "selftest_missing_barrier", launch(1, 64), &mut out)?;
    assert_eq!(driver.count(c"synchronizations"), 0);
    let _ = device.clone_dtoh(&out)?;
    let counts = [
        (c"launches", 2),
        (c"selftest_missing_barrier", 2),
        (c"selftest_reverse", 0),
        (c"allocations", 1),
        (c"htod_copies", 1),
        (c"htod_bytes", 256),
        (c"dtoh_copies", 1),
        (c"dtoh_bytes", 256),
        (c"live_bytes", live + 256),
    ];
    for (what, count) in counts {
        assert_eq!(driver.count(what), count, "{what:?}");
    }
    assert!(driver.count(c"synchronizations") > 0);
    drop(out);
    assert_eq!(driver.count(c"live_bytes"), live);

    driver.fail_allocations_after(1);
    let mut out = device.clone_htod(&[0f32; 64])?;
    assert!(device.clone_htod(&[0f32; 64]).is_err());
    driver.fail_launches(c"selftest_missing_barrier");
    let error = fault(
        &device,
        launch!(device, "selftest_missing_barrier", launch(1, 64), &mut out),
    )?;
    assert!(error.contains("made to fail"), "{error}");
    driver.stop_failing();
    launch!(device, "selftest_missing_barrier", launch(1, 64), &mut out)?;
    Ok(())
}

/// A module knows the kernels that its PTX names, with as many parameters.
#[test]
fn modules_know_the_kernels_of_their_ptx() -> Result<()> {
    let _driver = Driver::lock();
    let device = device()?;
    let ptx = ".visible .entry selftest_ballot(\n\t.param .u64 selftest_ballot_param_0\n)\n{ ret; }\n\
               .visible .entry selftest_reverse(\n\t.param .u64 a,\n\t.param .u32 b\n)\n{ ret; }\n";
    assert!(
        device
            .get_or_load_custom_func("selftest_ballot", "with_ptx", ptx)
            .is_ok()
    );
    let error = |name| {
        format!(
            "{:?}",
            device.get_or_load_custom_func(name, "with_ptx", ptx).err()
        )
    };
    assert!(error("selftest_reverse").contains("other parameters"));
    assert!(error("selftest_sum").contains("the PTX has no kernel"));
    let nowhere = device.get_or_load_custom_func("no_such_kernel", "without_ptx", "");
    assert!(format!("{:?}", nowhere.err()).contains("no kernel is compiled for the host"));
    Ok(())
}

/// Work is done when somebody waits for it.
#[test]
fn nothing_is_done_before_somebody_waits() -> Result<()> {
    let driver = Driver::lock();
    let device = device()?;
    let stream = device.cuda_stream();
    let values: Vec<f32> = (0..70u8).map(f32::from).collect();
    let data = device.clone_htod(&values)?;
    // SAFETY: read only after it was written, here or by the driver.
    let mut pinned = unsafe { stream.context().alloc_pinned_with_flags::<f32>(70, 0) }?;
    stream.memcpy_dtoh(&data, &mut pinned)?;
    let copied = stream.record_event(None)?;
    driver.reset_counts();
    // SAFETY: as above.
    let not_yet = unsafe { pinned.stream_synced_slice(&stream).0[0] };
    assert!(not_yet.is_nan());
    assert!(!copied.is_complete());
    copied.synchronize()?;
    assert!(copied.is_complete());
    assert_eq!(driver.count(c"synchronizations"), 1);
    assert_eq!(pinned.as_slice()?, values);
    Ok(())
}

/// Another thread's default stream is another stream: its work is not waited for.
#[test]
fn threads_have_streams_of_their_own() -> Result<()> {
    let _driver = Driver::lock();
    let device = device()?;
    let (start, end) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    let mut data = device.alloc_zeros::<f32>(8)?;
    device.cuda_stream().synchronize()?;
    let address = {
        let stream = device.cuda_stream();
        let (address, _guard) = data.device_ptr_mut(&stream);
        address
    };
    let (before, after) = std::thread::scope(|scope| {
        let other = scope.spawn(|| -> Result<()> {
            device.cuda_stream().context().bind_to_thread()?;
            // SAFETY: 32 bytes, which live longer than this thread.
            unsafe {
                result::memset_d8_async(address, 0x40, 32, device.cuda_stream().cu_stream())
            }?;
            start.wait();
            end.wait();
            Ok(device.cuda_stream().synchronize()?)
        });
        start.wait();
        let before = device.clone_dtoh(&data);
        end.wait();
        let joined = other.join().expect("no panic");
        (before, joined.and_then(|()| Ok(device.clone_dtoh(&data)?)))
    });
    assert_eq!(before?, [0.0; 8]);
    assert_eq!(after?, [f32::from_bits(0x4040_4040); 8]);
    Ok(())
}
