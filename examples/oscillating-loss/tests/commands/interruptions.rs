//! Signals and full disks: a run ends well, and what it did is there.
#![cfg(unix)]

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use tempfile::TempDir;

use crate::resume::latest;

#[test]
fn sigterm_and_ctrl_c_leave_all_files() {
    for (signal, status) in [("TERM", 143), ("INT", 130)] {
        let folder = TempDir::new().unwrap();
        let out = folder.path();
        let mut child = Command::new(env!("CARGO_BIN_EXE_oscillating-loss"))
            .args(["train", "--steps=1000000", "--batch=2", "--save-every=2"])
            .arg("--out")
            .arg(out)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while latest(out).is_none_or(|step| step < 4) {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            sleep(Duration::from_millis(2));
        }
        // Twice, as `timeout` does; the second Ctrl-C would drop the files.
        for _ in 0..if signal == "TERM" { 2 } else { 1 } {
            let kill = Command::new("sh")
                .args(["-c", &format!("kill -{signal} {}", child.id())])
                .status();
            assert!(kill.unwrap().success());
            sleep(Duration::from_millis(1));
        }
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{signal}: {errors}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("Test loss by step:"), "{text}");
        let metrics = fs::read_to_string(out.join("metrics.csv")).unwrap();
        let step = latest(out).unwrap();
        assert_eq!(metrics.lines().count() as u64, step + 1, "{signal}");
        assert!(out.join("summary.json").exists());
    }
}

/// A separate file system; none where nobody may mount one.
#[cfg(target_os = "linux")]
struct SmallDisk(TempDir);

#[cfg(target_os = "linux")]
impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(folder))
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_ends_no_training() {
    let Some(disk) = SmallDisk::mount("24m") else {
        println!("skipped: this user may not mount a tmpfs");
        return;
    };
    let out = disk.0.path();
    let mut child = Command::new(env!("CARGO_BIN_EXE_oscillating-loss"))
        .args(["train", "--steps=60", "--batch=2", "--eval-every=5"])
        .args(["--save-every=2", "--out"])
        .arg(out)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while latest(out).is_none_or(|step| step < 2) {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        sleep(Duration::from_millis(1));
    }
    let fill = fs::File::create(out.join("fill"));
    let filled = fill.and_then(|mut file| {
        loop {
            std::io::Write::write_all(&mut file, &[1; 4096])?;
        }
    });
    let _: Result<(), std::io::Error> = filled;
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("training goes on"), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Test loss by step:"), "{text}");
    assert!(text.contains(" 60 "), "{text}");
    assert!(latest(out).is_some());
}
