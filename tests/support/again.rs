//! A test that is run again, in its own process.

use std::io::Result;
use std::process::Command;

/// This test binary, told to run the test of this name (`module::test`) and no other, behind a
/// command such as `unshare` if there is one.
///
/// # Errors
/// If the system does not know where this binary is.
pub fn test_again(behind: &[&str], test: &str) -> Result<Command> {
    let this = std::env::current_exe()?;
    let mut command = match behind {
        [] => Command::new(this),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(this);
            command
        }
    };
    command.args([test, "--exact", "--include-ignored"]);
    command.args(["--test-threads", "1"]);
    Ok(command)
}
