#!/usr/bin/env bash
# Runs a command as if there were CUDA, for instance
#     ci/cuda-on-host/run.sh cargo test -p candle-grad-clip-tests --features cuda-on-host --test cuda_on_host
# KERNELS names further .cu files. Everything is built in target/cuda-on-host, apart from other builds.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(realpath -m "$here/../../target/cuda-on-host")
toolkit=$target/toolkit${SANITIZE:+-$SANITIZE}

# shellcheck disable=SC2086 # a list of files
"$here/build.sh" "$toolkit" ${KERNELS:-}
# The place that cargo knows stays one and the same, or it would build candle again.
ln -sfn "$toolkit" "$target/cuda"
export CUDA_HOME=$target/cuda CUDA_COMPUTE_CAP=90 CARGO_TARGET_DIR=$target
export PATH=$CUDA_HOME/bin:$PATH LD_LIBRARY_PATH=$CUDA_HOME/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if [ "${SANITIZE:-}" = address ]; then
    # For the tests only: neither cargo nor rustc is built for it.
    runner="env LD_PRELOAD=$("${CXX:-g++}" -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-}"
    export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$runner
fi
exec "$@"
