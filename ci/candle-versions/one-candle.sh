#!/usr/bin/env bash
# A project that follows the README has one candle: as a fresh project, and after each `cargo update`. With two,
# rustc says "multiple different versions of crate `candle_nn`".
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
projects=$root/target/one-candle
rm -rf "$projects"

# A project with this name and version in its folder, and the rest of its Cargo.toml.
project() {
    mkdir -p "$projects/$1/src"
    touch "$projects/$1/src/lib.rs"
    printf '[package]\nname = "%s"\nversion = "%s"\nedition = "2024"\n[workspace]\n%s\n' \
        "$2" "$3" "$4" >"$projects/$1/Cargo.toml"
}

# The project's lock file has one candle-core and one candle-nn, of this version.
has_one() {
    local crate found
    for crate in candle-core candle-nn; do
        found=$(grep -A 1 "^name = \"$crate\"$" "$projects/$1/Cargo.lock" | sed -n 's/^version = "\(.*\)"$/\1/p' | paste -sd ' ')
        case $found in
            *' '* | '') echo "$1, $3: $crate is there as '$found'" >&2 && return 1 ;;
            $2) ;;
            *) echo "$1, $3: $crate is $found" >&2 && return 1 ;;
        esac
    done
    echo "$1, $3: one candle, $found"
}

check() {
    cd "$projects/$1"
    cargo generate-lockfile --quiet
    has_one "$1" "$2" "fresh"
    cargo update --quiet
    has_one "$1" "$2" "updated"
}

ours="path = \"$root/crates/candle-grad-clip\""
for version in 0.9 0.10; do
    # Without our `cuda`: its weak features put candle 0.11 into the lock file, too, where it is not compiled.
    project "$version" project 0.1.0 "[dependencies]
candle-grad-clip = { $ours, default-features = false, features = [\"candle-${version/./_}\"] }
candle-core = \"$version\"
candle-nn = \"$version\""
    check "$version" "$version.*"
done
project 0.11 project 0.1.0 "[features]
cuda = [\"candle-grad-clip/cuda\"]
[dependencies]
candle-grad-clip = { $ours }
candle-core = \"0.11\"
candle-nn = \"0.11\""
check 0.11 '0.11.*'

# candle from git: its main branch calls itself 0.11.0 when the registry has 0.11.1. Stand-ins for its crates.
for crate in candle-core candle-nn; do project "git-$crate" "$crate" 0.11.0 ''; done
project git project 0.1.0 "[dependencies]
candle-grad-clip = { $ours }
candle-core = \"0.11.0\"
candle-nn = \"0.11.0\"
[patch.crates-io]
candle-core = { path = \"../git-candle-core\" }
candle-nn = { path = \"../git-candle-nn\" }"
check git '0.11.0'
