//! smoke
use candle_core::{Device, Tensor};
#[test]
fn smoke() -> anyhow::Result<()> {
    let gpu = Device::new_cuda(0)?;
    let x = Tensor::arange(0f32, 3000f32, &gpu)?;
    let y = (x.sqr()? * 2.0)?;
    println!("{:?}", y.sum_all()?.to_scalar::<f32>()?);
    let a = x.reshape((50, 60))?;
    let b = a.matmul(&a.t()?)?;
    println!("{:?}", b.max_keepdim(1)?.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}
