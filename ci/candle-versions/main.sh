#!/usr/bin/env bash
# Runs cargo on candle's main branch, or on the git repository in CANDLE, for instance
#     ci/candle-versions/main.sh check -p candle-grad-clip-tests --tests
# In a copy of Cargo.lock: this one's candle is from the registry.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
workspace=$root/target/candle-versions/main
mkdir -p "$workspace"
for path in "$root"/*; do
    [ "$path" = "$root/target" ] || ln -sfn "$path" "$workspace/"
done
rm -f "$workspace/Cargo.lock" "$workspace/Cargo.toml"
cp "$root/Cargo.lock" "$root/Cargo.toml" "$workspace/"
echo '[patch.crates-io]' >>"$workspace/Cargo.toml"
crates=(candle-core candle-nn candle-transformers)
for crate in "${crates[@]}"; do
    echo "$crate.git = \"${CANDLE:-https://github.com/huggingface/candle}\"" >>"$workspace/Cargo.toml"
done
cd "$workspace"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target} CARGO_PROFILE_DEV_DEBUG=false
# Without its entries, cargo takes the patch.
awk -v RS= -v ORS='\n\n' '!/\nname = "candle-(core|nn|transformers)"\nversion = "0\.11\./' Cargo.lock >Cargo.lock.new
mv Cargo.lock.new Cargo.lock
exec cargo "$@"
