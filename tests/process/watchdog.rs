//! The watchdog itself: it passes what ends, and reports what hangs, fails or is not there.

use std::time::Duration;

use support::watchdog::Watchdog;

#[test]
fn the_watchdog_passes_what_ends_and_sets_the_pool() {
    for threads in [1, 3] {
        Watchdog::new(
            "watchdog::the_watchdog_passes_what_ends_and_sets_the_pool",
            Duration::from_secs(60),
        )
        .rayon_threads(threads)
        .run(|| {
            assert_eq!(rayon::current_num_threads(), threads);
            Ok(())
        });
    }
}

#[test]
fn the_watchdog_ends_and_reports_what_hangs() {
    let name = "watchdog::the_watchdog_ends_and_reports_what_hangs";
    let error = Watchdog::new(name, Duration::from_secs(5))
        .case("a thread that waits")
        .outcome(|| {
            println!("before it waits");
            loop {
                std::thread::park();
            }
        })
        .unwrap_err()
        .to_string();
    let start = "watchdog::the_watchdog_ends_and_reports_what_hangs, a thread that waits, the default pool: \
                 hangs, it has not ended after 5s";
    assert!(error.starts_with(start), "{error}");
    assert!(error.contains("before it waits"), "{error}");
}

#[test]
fn the_watchdog_reports_a_panic() {
    let error = Watchdog::new(
        "watchdog::the_watchdog_reports_a_panic",
        Duration::from_secs(60),
    )
    .outcome(|| panic!("a wrong value"))
    .unwrap_err()
    .to_string();
    assert!(error.contains(": failed."), "{error}");
    assert!(error.contains("a wrong value"), "{error}");
}

#[test]
fn the_watchdog_reports_an_error() {
    let error = Watchdog::new(
        "watchdog::the_watchdog_reports_an_error",
        Duration::from_secs(60),
    )
    .outcome(|| anyhow::bail!("a wrong state"))
    .unwrap_err()
    .to_string();
    assert!(error.contains(": failed."), "{error}");
    assert!(error.contains("a wrong state"), "{error}");
}

#[test]
fn the_watchdog_reports_a_test_that_is_not_there() {
    let error = Watchdog::new("no_such_test", Duration::from_secs(60))
        .outcome(|| Ok(()))
        .unwrap_err()
        .to_string();
    assert!(error.contains("no test `no_such_test`"), "{error}");
}
