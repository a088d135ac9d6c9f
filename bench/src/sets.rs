//! The gradient sets: shapes only.

use clap::ValueEnum;

/// A gradient set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub(crate) enum Set {
    /// One tensor of 64 Mi elements.
    A,
    /// GPT-2 small: 148 tensors, 124 M elements.
    B,
    /// 10,000 tensors of 64 to 4096 elements.
    C,
    /// 30 tensors of about 1 k elements.
    D,
    /// GPT-2 XL: 580 tensors, 1.6 G elements.
    #[cfg(feature = "cuda")]
    E,
}

impl Set {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::A => "A",
            Self::B => "B",
            Self::C => "C",
            Self::D => "D",
            #[cfg(feature = "cuda")]
            Self::E => "E",
        }
    }

    /// The shapes of its tensors, in a model's order.
    pub(crate) fn shapes(self) -> Vec<Vec<usize>> {
        match self {
            Self::A => vec![vec![64 << 20]],
            Self::B => gpt2(12, 768),
            Self::C => uniform_lengths(10_000, 64..=4096),
            Self::D => uniform_lengths(30, 768..=1280),
            #[cfg(feature = "cuda")]
            Self::E => gpt2(48, 1600),
        }
    }

    /// Timed calls that make its medians stable.
    pub(crate) fn rounds(self) -> usize {
        match self {
            Self::A | Self::B => 25,
            Self::C => 50,
            Self::D => 2000,
            #[cfg(feature = "cuda")]
            Self::E => 15,
        }
    }

    /// Beside other frameworks: how often each has its turn, and how many calls a turn has.
    pub(crate) fn turns(self) -> (usize, usize) {
        match self {
            Self::A | Self::B => (11, 1),
            Self::C => (21, 1),
            Self::D => (25, 20),
            #[cfg(feature = "cuda")]
            Self::E => (11, 1),
        }
    }

    /// How many other frameworks have it at a time: each has its own B, of 3 to 6 GB.
    pub(crate) fn peers_at_once(self) -> usize {
        if self == Self::B { 2 } else { usize::MAX }
    }

    /// Of how many rounds the pasted code takes part in one: it takes longer than all else.
    pub(crate) fn rounds_per_paste_in(self) -> usize {
        match self {
            Self::C | Self::D => 1,
            _ => 5,
        }
    }

    /// Whether gradients start out of the cache. Those of a small model never leave it.
    pub(crate) fn is_cold(self) -> bool {
        self != Self::D
    }
}

/// Vectors of seeded lengths.
pub(crate) fn uniform_lengths(
    tensors: usize,
    elements: std::ops::RangeInclusive<usize>,
) -> Vec<Vec<usize>> {
    let mut rng = fastrand::Rng::with_seed(0);
    (0..tensors)
        .map(|_| vec![rng.usize(elements.clone())])
        .collect()
}

/// The parameters of a GPT-2; the output layer is the token embedding (tied weights).
fn gpt2(layers: usize, width: usize) -> Vec<Vec<usize>> {
    let layer_norm = [vec![width], vec![width]];
    let linear = |inputs: usize, outputs: usize| [vec![inputs, outputs], vec![outputs]];
    let layer = [
        layer_norm.clone(),
        linear(width, 3 * width), // attn.c_attn
        linear(width, width),     // attn.c_proj
        layer_norm.clone(),
        linear(width, 4 * width), // mlp.c_fc
        linear(4 * width, width), // mlp.c_proj
    ];
    let mut shapes = vec![vec![50_257, width], vec![1024, width]]; // wte, wpe
    for _ in 0..layers {
        shapes.extend(layer.iter().flatten().cloned());
    }
    shapes.extend(layer_norm); // ln_f
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(set: Set) -> Vec<usize> {
        let elements = |shape: Vec<usize>| shape.into_iter().product();
        set.shapes().into_iter().map(elements).collect()
    }

    #[test]
    fn a_is_one_tensor_of_64_mi() {
        assert_eq!(elements(Set::A), [67_108_864]);
    }

    #[test]
    fn b_is_gpt2_small() {
        assert_eq!(elements(Set::B).len(), 148);
        assert_eq!(elements(Set::B).iter().sum::<usize>(), 124_439_808);
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn e_is_gpt2_xl() {
        assert_eq!(elements(Set::E).len(), 580);
        assert_eq!(elements(Set::E).iter().sum::<usize>(), 1_557_611_200);
    }

    #[test]
    fn c_is_10_000_tensors_over_the_whole_range() {
        let elements = elements(Set::C);
        assert_eq!(elements.len(), 10_000);
        assert!(elements.iter().all(|n| (64..=4096).contains(n)));
        assert!(elements.iter().any(|n| *n < 128) && elements.iter().any(|n| *n > 4000));
        let mean = elements.iter().sum::<usize>() as f64 / 1e4;
        assert!((mean - 2080.0).abs() < 50.0, "{mean}");
    }

    #[test]
    fn d_is_30_tensors_of_about_1_k() {
        let elements = elements(Set::D);
        assert_eq!(elements.len(), 30);
        assert!(elements.iter().all(|n| (768..=1280).contains(n)));
    }

    #[test]
    fn shapes_are_the_same_on_every_run() {
        assert_eq!(Set::C.shapes(), Set::C.shapes());
    }
}
