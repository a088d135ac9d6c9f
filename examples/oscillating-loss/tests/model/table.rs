//! Numbers and ranges as text.

use oscillating_loss::tables::{number, range};

#[test]
fn numbers_have_four_digits() {
    let cases = [
        (0.09134, "0.09134"),
        (10.2422, "10.24"),
        (0.0, "0"),
        (123_456.0, "123456"),
        (1.234e9, "1.23e9"),
        (1.5e-9, "1.50e-9"),
        (f64::NAN, "NaN"),
        (f64::INFINITY, "inf"),
    ];
    for (value, text) in cases {
        assert_eq!(number(value), text);
    }
}

#[test]
fn ranges_read_well() {
    assert_eq!(range(None), "no rate");
    assert_eq!(range(Some((3e-3, 3e-3))), "only 3e-3");
    assert_eq!(range(Some((1e-3, 1e-1))), "1.0e-3 to 1.0e-1 (2.0 decades)");
}
