#!/usr/bin/env python3
"""Make link-time stub libraries for cudarc's dynamic-linking mode, from cudarc's own bindings.
usage: make_link_stubs.py CUDARC_SRC_DIR OUT_DIR     (needs gcc; no CUDA, no network)
The stubs carry only names and SONAMEs of CUDA 13; never load them at run time."""
import re, subprocess, sys, pathlib
src, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]); out.mkdir(parents=True, exist_ok=True)
LIBS = {"driver": ("cuda", "libcuda.so.1"), "nvrtc": ("nvrtc", "libnvrtc.so.13"),
        "curand": ("curand", "libcurand.so.10"), "cublas": ("cublas", "libcublas.so.13"),
        "cublaslt": ("cublasLt", "libcublasLt.so.13"), "runtime": ("cudart", "libcudart.so.13")}
EXTRA = {"runtime": ["__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary",
                     "__cudaRegisterFunction", "__cudaRegisterVar", "__cudaPushCallConfiguration",
                     "__cudaPopCallConfiguration", "__cudaInitModule", "__cudaGetKernel", "__cudaLaunchKernel",
                     "__cudaLaunchKernel_ptsz", "cudaLaunchKernel_ptsz", "cudaLaunchKernelExC_ptsz"]}
for mod, (lib, soname) in LIBS.items():
    text = (src / mod / "sys" / "mod.rs").read_text()
    names = set(re.findall(r'^\s+fn (\w+)\(', text, re.M)) | set(EXTRA.get(mod, []))
    if mod == "runtime":   # candle-kernels compiles with --default-stream per-thread: _ptsz/_ptds twins
        names |= {n + s for n in list(names) if not n.startswith("__") and not n.endswith(("_ptsz", "_ptds")) for s in ("_ptsz", "_ptds")}
    c = "".join(f"void {n}(void){{}}\n" for n in sorted(names))
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-x", "c", "-", f"-Wl,-soname,{soname}", "-o", str(out / f"lib{lib}.so")],
                   input=c.encode(), check=True)
    print(lib, soname, len(names))
