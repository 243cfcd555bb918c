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
    /// File, line and column, if it panicked.
    place: Option<String>,
    /// The beginning of what it says.
    message: Vec<String>,
}

impl Failure {
    /// Finds them all in what a test program has printed.
    pub fn all(output: &str) -> Vec<Self> {
        let mut failures = Vec::new();
        let mut lines = output.lines().peekable();
        while let Some(line) = lines.next() {
            let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
            else {
                continue;
            };
            let mut said = Vec::new();
            while let Some(line) = lines.next_if(|line| !is_end(line)) {
                said.push(line);
            }
            failures.push(Self::of(test, &said));
        }
        failures
    }

    /// Why a test failed that has printed these lines.
    fn of(test: &str, said: &[&str]) -> Self {
        // The first panic is the cause; the stack follows the message.
        let panic = said.iter().enumerate().find_map(|(at, line)| Some((at, panic_of_test(line)?)));
        let (place, message) = match panic {
            Some((at, place)) => {
                let message = said[at + 1..].iter().take_while(|line| !line.is_empty() && !is_stack(line));
                (Some(place.to_owned()), cut(message))
            }
            None => (None, cut(returned(said).iter().filter(|line| !line.is_empty()))),
        };
        Self { test: test.to_owned(), place, message }
    }
}

/// What a test has returned that did not panic: the test harness prints that last. Causes follow after an empty line.
fn returned<'a, 'b>(said: &'a [&'b str]) -> &'a [&'b str] {
    let start = said.iter().rposition(|line| line.starts_with("Error: ")).unwrap_or(said.len());
    let stack = said[start..].iter().position(|line| is_stack(line));
    &said[start..stack.map_or(said.len(), |stack| start + stack)]
}

fn cut<'a>(lines: impl Iterator<Item = &'a &'a str>) -> Vec<String> {
    lines.take(MOST_LINES).map(|line| line.chars().take(MOST_CHARACTERS).collect()).collect()
}

/// Where what a test has printed ends: with the next one's, or with the list of all that failed.
fn is_end(line: &str) -> bool {
    line == "failures:" || line.starts_with("---- ") && line.ends_with(" stdout ----")
}

/// Where a thread has panicked, in `thread 'NAME' (1234) panicked at FILE:LINE:COLUMN:`.
fn panic_of_test(line: &str) -> Option<&str> {
    let (thread, place) = line.split_once(" panicked at ")?;
    thread.starts_with("thread '").then(|| place.trim_end_matches(':'))
}

fn is_stack(line: &str) -> bool {
    ["stack backtrace:", "Stack backtrace:", "note: "].iter().any(|start| line.starts_with(start))
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.test)?;
        if let Some(place) = &self.place {
            write!(f, " at {place}")?;
        }
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

---- udp::keeps stdout ----
Error: tried once more
Error: sending to 10.0.0.1:80

Caused by:
    0: the socket
    1: Network is unreachable (os error 101)

Stack backtrace:
   0: anyhow::error

---- udp::says_nothing stdout ----

failures:
    agent::status
    tcp::keeps
    udp::keeps
    udp::says_nothing
";

    #[test]
    fn each_failure_is_told_with_its_first_panic_or_the_error_it_returns() {
        let told: Vec<_> = Failure::all(OUTPUT).iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "agent::status at tests/agent.rs:4:5\n    assertion `left == right` failed\n      left: 6\n     \
                 right: 0",
                "tcp::keeps at tests/tcp.rs:1:1\n    no",
                "udp::keeps\n    Error: sending to 10.0.0.1:80\n    Caused by:\n        0: the socket\n        1: Network is \
                 unreachable (os error 101)",
                "udp::says_nothing",
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
