//! Compiles `cuda/*.cu` to PTX, with the feature `cuda`.

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=cuda");
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    cudaforge::KernelBuilder::new()
        .source_dir("cuda")
        .watch(["cuda"])
        // A fixed capability: its PTX runs on all later GPUs.
        .compute_cap(75)
        .arg("-std=c++17")
        .arg("-O3")
        // As on CPU: no fused multiply-add.
        .arg("-fmad=false")
        .build_ptx()?
        .write(out_dir.join("ptx.rs"))?;
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {}
