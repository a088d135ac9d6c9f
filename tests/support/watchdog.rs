//! Tests of what might hang: a body runs in its own process, which is ended after a time.
//!
//! ```ignore
//! #[test]
//! fn two_threads_on_one_var_end() {
//!     for threads in [1, 2, 8] {
//!         Watchdog::new("two_threads_on_one_var_end", Duration::from_secs(20))
//!             .rayon_threads(threads)
//!             .run(|| train_and_evaluate());
//!     }
//! }
//! ```
//!
//! A body that hangs in a thread of the test itself would hold up all tests for ever: no thread can
//! be ended from outside, a process can. A process also has its own rayon pool, whose size
//! can be chosen.

use std::io::Read;
use std::process::{Child, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::again::test_again;

/// Set in the process that runs a body, to which one.
const MARK: &str = "CANDLE_GRAD_CLIP_WATCHDOG";
/// What that process says last. Without it no test of the given name was found, so nothing ran.
const DONE: &str = "watchdog: the body has ended";
/// How often the process is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Runs the body of a test in its own process and ends it after a time.
///
/// The process is the same test binary, told to run the one test. The test is entered a second time
/// there, as far as the call which started the process: keep what stands before that call short. A
/// test may have several calls, each with another [`case`](Self::case) or number of threads.
#[derive(Clone, Debug)]
#[must_use]
pub struct Watchdog {
    test: String,
    timeout: Duration,
    case: String,
    rayon_threads: Option<usize>,
}

impl Watchdog {
    /// For the test of this name, with the modules around it as the test binary lists them
    /// (`case::of_two`).
    pub fn new(test: &str, timeout: Duration) -> Self {
        Self {
            test: test.into(),
            timeout,
            case: String::new(),
            rayon_threads: None,
        }
    }

    /// Tells calls of one test apart, and is named where one fails.
    pub fn case(mut self, case: &str) -> Self {
        self.case = case.into();
        self
    }

    /// The size of rayon's pool in the process: `RAYON_NUM_THREADS`.
    pub fn rayon_threads(mut self, threads: usize) -> Self {
        self.rayon_threads = Some(threads);
        self
    }

    /// Runs the body.
    ///
    /// # Panics
    /// If the body hangs, fails or panics, and if there is no test of the name.
    pub fn run(&self, body: impl FnOnce() -> Result<()>) {
        if let Err(error) = self.outcome(body) {
            panic!("{error:#}");
        }
    }

    /// [`run`](Self::run) that returns what went wrong.
    ///
    /// # Errors
    /// If the body hangs, fails or panics, and if there is no test of the name.
    ///
    /// # Panics
    /// In its own process, if the body fails.
    pub fn outcome(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        match std::env::var(MARK) {
            Ok(mark) if mark == self.mark() => {
                if let Err(error) = body() {
                    panic!("{error:?}");
                }
                println!("{DONE}");
                // The rest of the test belongs to the process outside.
                std::process::exit(0);
            }
            // Another call's process.
            Ok(_) => Ok(()),
            Err(_) => self.watch(),
        }
    }

    fn mark(&self) -> String {
        let pool = match self.rayon_threads {
            Some(threads) => format!("a pool of {threads}"),
            None => "the default pool".into(),
        };
        match self.case.as_str() {
            "" => format!("{}, {pool}", self.test),
            case => format!("{}, {case}, {pool}", self.test),
        }
    }

    fn watch(&self) -> Result<()> {
        let mut command = test_again(&[], &self.test).context("the path of the test binary")?;
        command
            .arg("--nocapture")
            .env(MARK, self.mark())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(threads) = self.rayon_threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let mut child = command.spawn().context("the process of the test")?;
        let said = [reader(child.stdout.take()), reader(child.stderr.take())];
        let ended = wait(&mut child, self.timeout)?;
        let said = said.map(|it| it.join().unwrap_or_default());
        let (mark, output) = (self.mark(), said.concat());
        match ended {
            None => Err(anyhow!(
                "{mark}: hangs, it has not ended after {:?}. It said:\n{output}",
                self.timeout
            )),
            Some(status) if !status.success() => bail!("{mark}: failed. It said:\n{output}"),
            Some(_) if !output.contains(DONE) => bail!(
                "{mark}: nothing ran, the binary has no test `{}`. It said:\n{output}",
                self.test
            ),
            Some(_) => Ok(()),
        }
    }
}

/// Reads all that a pipe says: a full one would hold up the process.
fn reader(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came before an error is enough for a message.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The status of a process that ends in time; one that doesn't is ended.
fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= timeout {
            child.kill().context("ending the process of the test")?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}
