//! Why tests failed, out of all that their programs print then: what somebody reads first.

use std::fmt;

/// What of a message is shown.
const MOST_LINES: usize = 6;
const MOST_CHARACTERS: usize = 200;

/// A test that failed.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its name.
    test: String,
    /// File, line and column.
    place: String,
    /// The beginning of what it says.
    message: Vec<String>,
}

impl Failure {
    /// Finds them all in what a test program has printed.
    pub fn all(output: &str) -> Vec<Self> {
        let mut failures = Vec::new();
        let mut test = None;
        let mut lines = output.lines();
        while let Some(line) = lines.next() {
            if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
            {
                test = Some(name.to_owned());
            } else if let Some(place) = panic_of_test(line)
                && let Some(test) = test.take()
            {
                // The first panic is the cause; the stack follows the message.
                let message = lines.by_ref().take_while(|line| !line.is_empty() && !is_stack(line));
                let cut = |line: &str| line.chars().take(MOST_CHARACTERS).collect();
                let message = message.take(MOST_LINES).map(cut).collect();
                failures.push(Self { test, place: place.to_owned(), message });
            }
        }
        failures
    }
}

/// Where a thread has panicked, in `thread 'NAME' (1234) panicked at FILE:LINE:COLUMN:`.
fn panic_of_test(line: &str) -> Option<&str> {
    let (thread, place) = line.split_once(" panicked at ")?;
    thread.starts_with("thread '").then(|| place.trim_end_matches(':'))
}

fn is_stack(line: &str) -> bool {
    line.starts_with("stack backtrace:") || line.starts_with("note: ")
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.test, self.place)?;
        self.message.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
test agent::status ... FAILED
test ports::all ... ok

failures:

---- agent::status stdout ----
Error: something it had printed before

thread 'agent::status' (12) panicked at tests/agent.rs:4:5:
assertion `left == right` failed
  left: 6
 right: 0
stack backtrace:
   0: __rustc::rust_begin_unwind

thread 'agent::status' (12) panicked at tests/agent.rs:9:5:
while it was unwinding
---- tcp::keeps stdout ----

thread 'other' panicked at tests/tcp.rs:1:1:
no

failures:
    agent::status
    tcp::keeps
";

    #[test]
    fn each_failure_is_told_with_its_first_panic() {
        let told: Vec<_> = Failure::all(OUTPUT).iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "agent::status at tests/agent.rs:4:5\n    assertion `left == right` failed\n      left: 6\n     \
                 right: 0",
                "tcp::keeps at tests/tcp.rs:1:1\n    no",
            ]
        );
    }

    #[test]
    fn a_long_message_is_cut() {
        let lines = "x".repeat(1000) + &"\ny".repeat(50);
        let output = format!("---- a stdout ----\nthread 'a' (1) panicked at b.rs:1:1:\n{lines}\n");
        let [failure] = &Failure::all(&output)[..] else { panic!("one") };
        assert_eq!((failure.message.len(), failure.message[0].len()), (MOST_LINES, MOST_CHARACTERS));
    }

    #[test]
    fn what_passed_is_no_failure() {
        assert_eq!(Failure::all("test a ... ok\nthread 'a' (1) panicked at b.rs:1:1:\nshould panic\n"), []);
    }
}
