#!/usr/bin/env bash
# Runs a command as if there were CUDA, for instance
#     ci/cuda-on-host/run.sh cargo test -p candle-grad-clip-tests --features cuda-on-host --test cuda_on_host
# KERNELS names further .cu files. The stand-in for CUDA is built in target/cuda-on-host.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(realpath -m "$here/../../target/cuda-on-host")
toolkit=$target/toolkit

# shellcheck disable=SC2086 # a list of files
SANITIZE='' "$here/build.sh" "$toolkit" ${KERNELS:-}
libraries=$toolkit/lib
if [ "${SANITIZE:-}" = address ]; then
    # shellcheck disable=SC2086
    "$here/build.sh" "$target/address" ${KERNELS:-}
    libraries=$target/address/lib
    export CUDA_ON_HOST_SANITIZE=1
    # For the tests only: neither cargo nor rustc is built for it.
    preload=$("${CXX:-g++}" -print-file-name=libasan.so)
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-}"
fi
mkdir -p "$toolkit/include"
touch "$toolkit/include/cuda.h" # candle 0.9 looks for it
export CUDA_HOME=$toolkit CUDA_COMPUTE_CAP=90
export PATH=$CUDA_HOME/bin:$PATH LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
exec "$@"
