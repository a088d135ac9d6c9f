//! Checks that one version of candle is chosen: before the crate is compiled, so that no other error hides the answer.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let versions = [
        ("candle-0_9", cfg!(feature = "candle-0_9")),
        ("candle-0_10", cfg!(feature = "candle-0_10")),
        ("candle-0_11", cfg!(feature = "candle-0_11")),
    ];
    let chosen: Vec<&str> = versions
        .iter()
        .filter_map(|(name, is_chosen)| is_chosen.then_some(*name))
        .collect();
    match chosen[..] {
        [_] => {}
        [] => println!(
            "cargo::error=no version of candle is chosen. Write `candle-grad-clip = {{ .., \
             default-features = false, features = [\"candle-0_10\"] }}`, or \"candle-0_9\"; for candle 0.11, \
             leave out `default-features = false`"
        ),
        _ => println!(
            "cargo::error=more than one version of candle is chosen: {}. For 0.9 and 0.10, write \
             `default-features = false` at each dependency on candle-grad-clip, also in other crates; \
             `cargo tree --edges features --invert candle-grad-clip` lists them",
            chosen.join(", ")
        ),
    }
}
