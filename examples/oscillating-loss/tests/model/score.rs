//! Roughness, medians, usable ranges.

use oscillating_loss::score::{decades, median, roughness, usable_range};

#[test]
fn roughness_is_the_mean_log_jump_of_the_second_half() {
    // The wild first half doesn't count; then 1 -> 2 -> 1 jumps by log 2 twice.
    let rough = roughness(&[9.0, 1e9, 0.1, 1.0, 2.0, 1.0]).unwrap_or(f64::NAN);
    assert!((rough - 2f64.ln()).abs() < 1e-12, "{rough}");
    let flat = roughness(&[3.0, 1.0, 1.0, 1.0]).unwrap_or(f64::NAN);
    assert!(flat == 0.0, "{flat}");
}

#[test]
fn roughness_needs_two_finite_losses() {
    assert_eq!(roughness(&[]), None);
    assert_eq!(roughness(&[1.0, 2.0]), None);
    assert_eq!(roughness(&[1.0, 1.0, 1.0, f64::NAN]), None);
    assert_eq!(roughness(&[1.0, 1.0, 1.0, f64::INFINITY]), None);
}

#[test]
fn median_of_even_odd_none_and_diverged() {
    assert_eq!(median([3.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median([4.0, 1.0]), Some(2.5));
    assert_eq!(median([]), None);
    assert_eq!(median([1.0, f64::INFINITY]), Some(f64::INFINITY));
}

fn assert_range(curve: &[(f64, f64)], best: f64, expected: (f64, f64)) {
    let (low, high) = usable_range(curve, best).unwrap_or((f64::NAN, f64::NAN));
    let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-3;
    assert!(
        near(low, expected.0) && near(high, expected.1),
        "{low} to {high}"
    );
}

const INF: f64 = f64::INFINITY;

fn curve(losses: [f64; 6]) -> Vec<(f64, f64)> {
    [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
        .into_iter()
        .zip(losses)
        .collect()
}

#[test]
fn usable_range_of_known_losses() {
    // The losses of the issue that asked for this: PyTorch, SGD, power 4. The limit is 0.1092:
    // none: 3e-3 * (1e-3 / 3e-3)^(ln(0.1092 / 0.100) / ln(0.139 / 0.100)), up to 3e-3: NaN
    // follows.
    let none = curve([0.6, 0.139, 0.100, INF, INF, INF]);
    assert_range(&none, 0.091, (2.237e-3, 3e-3));
    // norm: from just below 1e-3, up to 3e-2 * (1e-1 / 3e-2)^(ln(0.1092 / 0.107) / ln(0.111 /
    // 0.107)).
    let norm = curve([2.08, 0.106, 0.093, 0.091, 0.107, 0.111]);
    assert_range(&norm, 0.091, (9.772e-4, 5.849e-2));
}

#[test]
fn usable_range_is_the_widest_unbroken_row_and_ends_where_runs_diverge() {
    assert_range(&curve([1.0, INF, 1.0, 1.0, 1.0, 1.0]), 1.0, (3e-3, 1e-1));
    assert_range(&curve([1.0, 1.0, 1.0, INF, 1.0, INF]), 1.0, (1e-4, 3e-3));
    assert_eq!(usable_range(&curve([INF; 6]), 1.0), None);
    assert_eq!(usable_range(&[], 1.0), None);
    assert!((decades((1e-3, 3e-2)) - 1.477).abs() < 1e-3);
}

#[test]
fn the_limit_itself_is_usable() {
    assert_range(&[(0.1, 1.2), (1.0, 1.21)], 1.0, (0.1, 0.1));
    assert_eq!(usable_range(&[(0.1, 1.201)], 1.0), None);
}
