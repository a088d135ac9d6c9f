/// Elements per task. The calling thread handles slices up to this length alone.
///
/// 64 Ki f32 values are 256 KiB: large enough that starting a task costs little, and small enough
/// to spread a matrix evenly over threads.
///
/// ```
/// use candle_grad_clip_kernels::{BLOCK, NormType, measure};
///
/// let ones = vec![1f32; BLOCK + 1]; // two tasks
/// assert_eq!(measure(&ones, NormType::L1).power.sum, (BLOCK + 1) as f64);
/// ```
pub const BLOCK: usize = 64 * 1024;
