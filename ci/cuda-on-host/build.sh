#!/usr/bin/env bash
# Builds a stand-in for the CUDA toolkit and driver whose kernels run on the CPU.
#
#     build.sh OUT_DIR [KERNELS.cu...]
#
# OUT_DIR gets `bin/nvcc` (which compiles nothing), `lib/libcuda.so.1` with all that candle links of
# CUDA, and a library for each file of kernels: candle's own, this repository's, and those given.
# SANITIZE=address builds the kernels with AddressSanitizer; run.sh then preloads it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
out=$(realpath -m "$1")
shift

shopt -s nullglob
given=("$here/selftest.cu" "$root"/crates/candle-grad-clip-kernels/cuda/*.cu "$@")

# Nothing to do if it was built from the same files, unchanged.
made_of=$(echo "${CXX:-}"; md5sum "$here"/* "$here"/include/* "$root/Cargo.lock" "$root"/crates/candle-grad-clip-kernels/cuda/* "${given[@]}" 2>/dev/null) || true
if [ "$(cat "$out/made_of" 2>/dev/null)" = "$made_of" ]; then exit 0; fi

cxx=${CXX:-g++}
flags=(-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing)
[ -z "${SANITIZE:-}" ] || flags+=("-fsanitize=$SANITIZE" -fno-omit-frame-pointer)

# Where cargo keeps the sources of a crate that Cargo.lock names.
source_of() {
    (cd "$root" && cargo metadata --format-version 1 --locked --features candle-grad-clip-tests/cuda) |
        grep -oE "\"manifest_path\":\"[^\"]*/$1-[0-9.]+/Cargo.toml\"" | head -1 | cut -d'"' -f4 | xargs dirname
}

# One library of a file's kernels, named to it with their parameters.
kernels() {
    local file=$1 name
    name=$(basename "$file" .cu)
    local with=(-x c++ -include "$here/shim.h" -I "$here/include" -I "$(dirname "$file")" -w)
    {
        echo "#include \"$file\""
        "$cxx" "${flags[@]}" "${with[@]}" -DCUDA_ON_HOST_LIST_KERNELS -E -P "$file" | tr '\n' ' ' |
            sed -E 's/> *CUDA_ON_HOST_KERNEL/> a template/g' |
            grep -oE 'CUDA_ON_HOST_KERNEL +void +[A-Za-z0-9_]+' |
            sed -E 's/.* (.*)/CUDA_ON_HOST_REGISTER(\1)/' || true
    } >"$work/$name.cpp"
    # `extern __shared__ T name[]` is the shared memory that a launch asks for.
    sed -nE 's/.*extern +__shared__ .*[ *]([A-Za-z0-9_]+) *\[ *\].*/\1/p' "$file" | sort -u |
        sed -E 's/.*/__thread char &[48 << 10] __attribute__((aligned(128)));/' >"$work/$name.c"
    "${CC:-gcc}" -fPIC -c "$work/$name.c" -o "$work/$name.c.o"
    "$cxx" "${flags[@]}" "${with[@]}" -c "$work/$name.cpp" -o "$work/$name.o"
    "$cxx" "${flags[@]}" -shared "$work/$name.o" "$work/$name.c.o" -o "$work/kernels/$name.so"
}

# Functions that abort with their name, for all that cudarc and candle link and nothing here defines.
missing() {
    echo '#include <stdio.h>'
    echo '#include <stdlib.h>'
    echo '#define MISSING(name) __attribute__((weak)) void name(void) { fputs("cuda on host: no " #name "\n", stderr); abort(); }'
    {
        for part in driver nvrtc curand cublas cublaslt; do
            sed -nE 's/^ +fn ([A-Za-z0-9_]+)\(.*/MISSING(\1)/p' "$cudarc/src/$part/sys/mod.rs"
        done
        sed -nE 's/^ *pub fn ([A-Za-z0-9_]+)\(.*/MISSING(\1)/p' "$candle_kernels/src/ffi.rs"
    } | sort -u
}

cudarc=$(source_of cudarc)
candle_kernels=$(source_of candle-kernels)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/kernels"

compile_driver() {
    missing >"$work/missing.c"
    "${CC:-gcc}" -fPIC -w -c "$work/missing.c" -o "$work/missing.o"
    "$cxx" "${flags[@]}" -O2 -Wall -Wextra -shared "$here"/{run_grid,streams,driver,libraries}.cpp "$work/missing.o" \
        -Wl,-soname,libcuda.so.1 -o "$work/libcuda.so.1"
}

jobs=()
compile_driver &
jobs+=($!)
for file in "$candle_kernels"/src/{affine,binary,cast,conv,fill,indexing,reduce,sort,ternary,unary}.cu "${given[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    kernels "$(realpath "$file")" &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done

mkdir -p "$out/bin" "$out/lib"
cp "$here/nvcc-check-only" "$out/bin/nvcc"
rm -rf "$out/lib/kernels"
mv "$work/kernels" "$out/lib/kernels"
mv "$work/libcuda.so.1" "$out/lib/"
for name in cuda nvrtc curand cublas cublasLt cudart; do ln -sf libcuda.so.1 "$out/lib/lib$name.so"; done
echo "$made_of" >"$out/made_of"
