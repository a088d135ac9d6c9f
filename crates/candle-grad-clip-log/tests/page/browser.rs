//! What a headless Chromium makes of a page: `drive.js` uses it as a reader would.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use candle_grad_clip_log::page::{Page, Refresh};
use serde_json::Value;

use crate::demo;

/// The first Chromium there is; `CHROMIUM` names another.
fn chromium() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("CHROMIUM") {
        return Some(named.into());
    }
    let folders = std::env::var_os("PATH")?;
    let names = [
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ];
    let places = std::env::split_paths(&folders).flat_map(|at| names.map(|name| at.join(name)));
    places.into_iter().find(|path| path.is_file())
}

/// The page with the script that uses it. Faults are gathered from the start.
fn driven(page: &Page) -> String {
    const FAULTS: &str = "<script>window.faults = [];\
        addEventListener('error', (event) => faults.push(event.message));\
        console.error = console.warn = (...all) => faults.push(all.join(' '));</script>";
    let html = page
        .to_html()
        .replacen("<head>", &format!("<head>{FAULTS}"), 1);
    let (before, after) = html.rsplit_once("</body>").unwrap();
    format!(
        "{before}<script>{}</script></body>{after}",
        include_str!("drive.js")
    )
}

/// Opens a file, waits until its scripts rest, and returns the document and the log.
fn open(browser: &Path, file: &Path, width: u32) -> (String, String) {
    let folder = tempfile::tempdir().unwrap();
    let [dom, log] = ["dom", "log"].map(|name| folder.path().join(name));
    let mut running = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
        ])
        .args(["--no-first-run", "--disable-background-networking"])
        .args([
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
        ])
        .arg(format!(
            "--user-data-dir={}",
            folder.path().join("user").display()
        ))
        .arg(format!("--window-size={width},900"))
        .args(["--virtual-time-budget=30000", "--dump-dom"])
        .arg(format!("file://{}", file.display()))
        .stdout(Stdio::from(fs::File::create(&dom).unwrap()))
        .stderr(Stdio::from(fs::File::create(&log).unwrap()))
        .spawn()
        .unwrap();
    let start = Instant::now();
    while running.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(120) {
            running.kill().unwrap();
            running.wait().unwrap();
            panic!("the browser hangs: {}", fs::read_to_string(&log).unwrap());
        }
        thread::sleep(Duration::from_millis(50));
    }
    [dom, log]
        .map(|path| fs::read_to_string(path).unwrap())
        .into()
}

/// What `drive.js` saw, or `None` where there is no browser.
fn used(width: u32) -> Option<Value> {
    let Some(browser) = chromium() else {
        println!("skipped: there is no Chromium to open the page");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("index.html");
    let mut page = demo::page(100_000, 60, 400);
    page.refresh = Some(Refresh { seconds: 2.0 });
    fs::write(&file, driven(&page)).unwrap();
    let (dom, log) = open(&browser, &file, width);
    let console: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("CONSOLE"))
        .collect();
    assert!(console.is_empty(), "{console:?}");
    let result = dom
        .split_once("<pre id=\"result\">")
        .and_then(|(_, rest)| rest.split_once("</pre>"));
    let Some((result, _)) = result else {
        panic!("the page was not used to the end: {log}");
    };
    let result = result
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&");
    Some(serde_json::from_str(&result).unwrap())
}

/// The ends of the x axis of each panel.
fn ends(axes: &Value) -> Vec<[f64; 2]> {
    serde_json::from_value(axes.clone()).unwrap()
}

fn assert_holds(text: &Value, parts: &[&str]) {
    let text = text.as_str().unwrap();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
}

#[test]
fn a_browser_draws_the_page_and_it_can_be_used() {
    let Some(seen) = used(1280) else { return };
    assert_eq!(seen["faults"], serde_json::json!([]));
    for colors in seen["colors"].as_array().unwrap() {
        assert!(
            colors.as_u64().unwrap() > 50,
            "a chart is empty: {}",
            seen["colors"]
        );
    }

    // Hover shows all values at an x, over all panels.
    assert_holds(
        &seen["hover"],
        &[
            "step 49,",
            "train",
            "test at 50,000",
            "train without clipping",
        ],
    );
    assert_eq!(seen["cursor"], "block");
    let all = [
        "global norm",
        "before clipping",
        "after clipping",
        "coefficient",
        "clipped share",
    ];
    assert_holds(&seen["linkedHover"], &all);

    // A drag zooms all panels, and y follows; double click, keys and the button.
    assert_eq!(seen["selection"], true);
    let [whole, zoomed, keys] = ["wholeX", "zoomedX", "keyX"].map(|name| ends(&seen[name]));
    assert_eq!(zoomed.len(), 3);
    assert!(zoomed.iter().all(|one| *one == zoomed[0]));
    assert!(whole[0][0] < 1.0 && whole[0][1] > 100_000.0);
    assert!((20_000.0..40_000.0).contains(&zoomed[0][0]), "{zoomed:?}");
    assert!((40_000.0..60_000.0).contains(&zoomed[0][1]), "{zoomed:?}");
    assert_ne!(seen["wholeY"], seen["zoomedY"]);
    assert_eq!(ends(&seen["resetX"]), whole);
    assert!(keys[0][0] > whole[0][0] && keys[0][1] < whole[0][1]);
    assert_eq!(seen["canReset"], true);
    assert_eq!(ends(&seen["buttonX"]), whole);

    // Positions on the axis are logarithms, and values once the switch is off.
    assert!(seen["logTop"].as_f64().unwrap() < 10.0);
    assert!(seen["linearTop"].as_f64().unwrap() > 1e30);
    // Three lines and the levels; one is hidden then.
    assert_eq!(seen["lines"], serde_json::json!([4, 3]));
    assert_eq!(seen["crosses"], serde_json::json!([false, false, true]));
    assert_holds(&seen["cell"], &["encoder.layers.", "step ", "norm "]);
    let all = ["GPT-2 small, bf16", "1.1", "1.8", "2.5", "3.2", "3.9"];
    assert_holds(&seen["named"], &all);
    others(&seen);
}

fn others(seen: &Value) {
    let sorted = serde_json::json!([
        ["none", "9", "10,300", "1,204"],
        ["descending", "10,300", "1,204", "9"],
        ["ascending", "9", "1,204", "10,300"],
    ]);
    assert_eq!(seen["sort"], sorted);
    assert_eq!(seen["injected"], 0);
    assert_eq!(
        seen["links"],
        serde_json::json!(["seed-2/index.html", null])
    );
    assert_eq!(seen["contents"], 6);
    assert_ne!(seen["themes"][0], seen["themes"][1]);
    assert_eq!(
        seen["svg"],
        serde_json::json!([true, true, true, true, true])
    );
    // It reloaded itself, though not while a button was held, and kept scroll and zoom.
    assert_eq!(seen["waited"], "yes");
    assert_eq!(seen["scroll"], 700);
    assert_eq!(seen["keptX"][0], seen["keptX"][1]);
}

#[test]
fn a_phone_shows_it_without_scrolling_sideways() {
    let Some(seen) = used(500) else { return };
    assert_eq!(seen["faults"], serde_json::json!([]));
    assert_eq!(seen["sideways"], false);
    assert_holds(&seen["hover"], &["train", "test"]);
}
