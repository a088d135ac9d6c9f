//! Numbers for people.

/// Four digits; small and large numbers with an exponent.
pub(crate) fn number(x: f64) -> String {
    let size = x.abs();
    if x == 0.0 || !x.is_finite() {
        format!("{x}")
    } else if !(1e-3..1e5).contains(&size) {
        format!("{x:.3e}")
    } else {
        let digits = (3 - size.log10().floor() as i32).max(0) as usize;
        format!("{x:.digits$}")
    }
}

/// A share of 1 in percent.
pub(crate) fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    // 0 and 100 are said only of none and all.
    if share > 0.0 && percent < 0.1 {
        "under 0.1 %".into()
    } else if share < 1.0 && percent > 99.9 {
        "over 99.9 %".into()
    } else {
        let digits = usize::from(percent < 10.0 && percent.fract() != 0.0);
        format!("{percent:.digits$} %")
    }
}

/// A time in its two largest units.
pub(crate) fn time(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 if seconds < 10.0 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// "1 step", "2 steps".
pub(crate) fn count(n: u64, noun: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let shown = [0.0, 1.0, -0.012_345, 123.456, 99_999.0, 1e5, 1e-4, f64::NAN].map(number);
        let expected = [
            "0", "1.000", "-0.01235", "123.5", "99999", "1.000e5", "1.000e-4", "NaN",
        ];
        assert_eq!(shown, expected);
        assert_eq!(number(f64::NEG_INFINITY), "-inf");
    }

    #[test]
    fn shares_and_times_are_rounded() {
        let shown = [0.0, 1e-5, 0.0123, 0.5, 0.9999, 1.0].map(percent);
        let expected = [
            "0 %",
            "under 0.1 %",
            "1.2 %",
            "50 %",
            "over 99.9 %",
            "100 %",
        ];
        assert_eq!(shown, expected);
        let shown = [0.25, 59.0, 61.0, 7300.0, 90_000.0].map(time);
        assert_eq!(
            shown,
            ["0.2 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]
        );
        assert_eq!([count(1, "step"), count(2, "step")], ["1 step", "2 steps"]);
    }
}
