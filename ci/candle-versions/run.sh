#!/usr/bin/env bash
# Runs cargo over the library and its tests on another version of candle, for instance
#     ci/candle-versions/run.sh 0.10 test -p candle-grad-clip-tests --test functions
# The workspace is this one, through links in target/candle-versions, with another version of candle in its
# Cargo.toml. Its lock file is ci/candle-versions/VERSION.lock: `run.sh VERSION update` changes it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(realpath "$here/../..")
version=$1
shift
case $version in
    0.9)
        exact=0.9.2
        if [ -n "${CUDA_HOME:-}" ]; then export CUDA_PATH=$CUDA_HOME; fi # its build script looks there
        ;;
    0.10) exact=0.10.2 ;;
    *)
        echo "which candle: 0.9 or 0.10?" >&2
        exit 2
        ;;
esac

workspace=$root/target/candle-versions/$version
mkdir -p "$workspace"
for folder in crates tests docs README.md; do ln -sfn "$root/$folder" "$workspace/$folder"; done
ln -sfn "$here/$version.lock" "$workspace/Cargo.lock"
members='"crates/candle-grad-clip", "crates/candle-grad-clip-kernels", "tests"'
sed -e "s/^\(candle-[a-z]* = \)\"[0-9.]*\"/\1\"$exact\"/" \
    -e "s/^\(candle-grad-clip = { .*\) }/\1, default-features = false, features = [\"candle-${version/./_}\"] }/" \
    -e "/^members = \[/,/^\]/c members = [$members]" \
    -e '/^exclude/d' "$root/Cargo.toml" >"$workspace/Cargo.toml"
# Compiling candle takes longer than the tests.
cat >>"$workspace/Cargo.toml" <<'END'
[profile.dev.package]
candle-core.opt-level = 1
candle-nn.opt-level = 1
END
cd "$workspace"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target} CARGO_PROFILE_DEV_DEBUG=false
exec cargo "$@"
