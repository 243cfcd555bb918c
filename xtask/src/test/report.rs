//! Reading what cargo and the test programs print.

use std::{
    fmt, ops,
    path::{Path, PathBuf},
};

/// What became of tests.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// They ran and passed.
    pub passed: u64,
    /// They failed, or their program did.
    pub failed: u64,
    /// They were left out, and say nothing.
    pub skipped: u64,
}

impl Counts {
    /// Sums up a finished run. One that fails without a failed test has crashed, and one without a result
    /// has ended before its tests did, whatever it says itself: either is a failure.
    pub fn of_run(output: &str, succeeded: bool) -> Self {
        let mut counts = Self::default();
        let mut results = 0;
        for result in output.lines().filter_map(Self::of_line) {
            counts += result;
            results += 1;
        }
        if counts.failed == 0 && (!succeeded || results == 0) {
            counts.failed = 1;
        }
        counts
    }

    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
    fn of_line(line: &str) -> Option<Self> {
        let mut counts = Self::default();
        for part in line.strip_prefix("test result: ")?.split(';') {
            let mut words = part.split_whitespace().rev();
            let (what, count) = (words.next()?, words.next()?);
            let counter = match what {
                "passed" => &mut counts.passed,
                "failed" => &mut counts.failed,
                "ignored" => &mut counts.skipped,
                _ => continue,
            };
            *counter = count.parse().ok()?;
        }
        Some(counts)
    }
}

impl ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// A program with tests in it.
#[derive(Debug, PartialEq, Eq)]
pub struct TestBinary {
    /// The program.
    pub executable: PathBuf,
    /// The directory of its package.
    pub package: PathBuf,
    /// Its main source file.
    pub source: PathBuf,
    /// It is from a package's `tests` directory, not the unit tests of a library or program.
    pub is_integration: bool,
}

impl TestBinary {
    /// Reads a line of cargo's JSON messages; most are about something else.
    pub fn parse(message: &str) -> Option<Self> {
        // The target says whether it has tests, the profile whether they were built into this program.
        let (target, rest) = message.split_once(r#""profile":{"#)?;
        let (profile, _) = rest.split_once('}')?;
        if !target.starts_with(r#"{"reason":"compiler-artifact""#) || !profile.contains(r#""test":true"#) {
            return None;
        }
        Some(Self {
            executable: string(message, "executable")?.into(),
            package: Path::new(&string(message, "manifest_path")?).parent()?.to_owned(),
            source: string(message, "src_path")?.into(),
            is_integration: target.contains(r#""kind":["test"]"#),
        })
    }
}

/// The string of a name in a line of JSON. Enough for paths: only quotes and backslashes are escaped in them.
fn string(message: &str, name: &str) -> Option<String> {
    let (_, rest) = message.split_once(&format!("\"{name}\":\""))?;
    let mut value = String::new();
    let mut characters = rest.chars();
    loop {
        match characters.next()? {
            '"' => return Some(value),
            '\\' => value.push(characters.next()?),
            character => value.push(character),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: &str = "running 4 tests\ntest a ... ok\n\n\
        test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 20 filtered out; finished in 0.00s\n";
    const FAILED: &str = "test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s\n";

    fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts { passed, failed, skipped }
    }

    #[test]
    fn results_are_summed_and_ignored_tests_are_not_passed_ones() {
        assert_eq!(Counts::of_run(PASSED, true), counts(3, 0, 1));
        assert_eq!(Counts::of_run(FAILED, false), counts(10, 2, 0));
        assert_eq!(Counts::of_run(&format!("{PASSED}{FAILED}"), false), counts(13, 2, 1));
    }

    #[test]
    fn colours_do_not_matter() {
        let coloured = PASSED.replace("ok. ", "\u{1b}[32mok\u{1b}(B\u{1b}[m. ");
        assert_eq!(Counts::of_run(&coloured, true), counts(3, 0, 1));
    }

    #[test]
    fn a_crash_and_an_early_end_are_failures() {
        assert_eq!(Counts::of_run("running 4 tests\n", false), counts(0, 1, 0));
        assert_eq!(Counts::of_run("running 4 tests\n", true), counts(0, 1, 0));
        assert_eq!(Counts::of_run(PASSED, false), counts(3, 1, 1));
    }

    #[test]
    fn other_lines_are_not_results() {
        assert_eq!(Counts::of_line("test result_of_adding ... ok"), None);
        assert_eq!(Counts::of_line("the test result: ok. 3 passed; 0 failed"), None);
    }

    #[test]
    fn the_sum_names_skipped_tests_only_if_there_are_any() {
        assert_eq!(counts(12, 0, 0).to_string(), "12 passed, 0 failed");
        assert_eq!(counts(12, 1, 3).to_string(), "12 passed, 1 failed, 3 skipped");
    }

    fn artifact(kind: &str, test: bool, executable: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","package_id":"path+file:///src/tests#srcip-tests@0.1.0","manifest_path":"/src/tests/Cargo.toml","target":{{"kind":["{kind}"],"crate_types":["bin"],"name":"integration","src_path":"/src/tests/tests/main.rs","edition":"2024","doc":false,"doctest":false,"test":true}},"profile":{{"opt_level":"0","debuginfo":1,"debug_assertions":true,"overflow_checks":true,"test":{test}}},"features":[],"filenames":["/target/debug/deps/integration-1"],"executable":{executable},"fresh":true}}"#
        )
    }

    #[test]
    fn test_programs_are_found_in_cargos_messages() {
        let found =
            TestBinary::parse(&artifact("test", true, r#""/target/debug/deps/with \"quotes\"""#)).unwrap();
        assert_eq!(
            found,
            TestBinary {
                executable: "/target/debug/deps/with \"quotes\"".into(),
                package: "/src/tests".into(),
                source: "/src/tests/tests/main.rs".into(),
                is_integration: true,
            }
        );
        let unit = TestBinary::parse(&artifact("lib", true, r#""/target/debug/deps/unit-1""#)).unwrap();
        assert!(!unit.is_integration);
    }

    #[test]
    fn what_is_no_test_program_is_passed_over() {
        assert_eq!(TestBinary::parse(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(TestBinary::parse(&artifact("lib", true, "null")), None);
        assert_eq!(TestBinary::parse(&artifact("bin", false, r#""/target/debug/srcip""#)), None);
    }
}
