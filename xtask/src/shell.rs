//! Running other programs, and telling how they are getting on.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Once,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// How much of a failed command's output is shown.
const SHOWN_LINES: usize = 15;

/// The checkout this program was built from.
pub fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a directory of the checkout")
}

/// Where cargo leaves what it builds.
pub fn target_dir() -> PathBuf {
    checkout().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Cargo's own directory; what `cargo install` installs is in its `bin`.
pub fn cargo_home() -> Result<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")
}

/// The cargo that runs us.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(checkout());
    command
}

/// A program on PATH, or where administrators' programs are: few users have those on their PATH.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let administrators = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    env::split_paths(&path)
        .chain(administrators)
        .map(|directory| directory.join(name))
        .find(|p| is_program(p))
}

/// Whether there is a file here (links followed) that can be run.
pub fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// What a command prints, for us to read; an error if it fails.
pub fn output(command: &mut Command) -> Result<String> {
    // What is read must not be translated.
    command.env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().with_context(|| format!("starting `{}`", describe(command)))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed with {}: {}", describe(command), output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command that talks to the user; an error if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("starting `{}`", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed with {status}", describe(command));
    }
    Ok(())
}

/// One line about what happens.
pub fn note(line: &str) {
    eprintln!("{line}");
}

/// Runs a command that may take long and has nothing to ask. Its output goes to a file; on the terminal
/// are the seconds that it has taken so far and, if it fails, its last lines.
pub fn step(command: &mut Command) -> Result<()> {
    let path = checkout().join("target/xtask-setup.log");
    let mut log = open_log(&path)?;
    writeln!(log, "$ {}", describe(command))?;
    let start_of_output = log.seek(SeekFrom::End(0))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let mut child = command.spawn().with_context(|| format!("starting `{}`", describe(command)))?;

    let mut progress = Progress::new();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        progress.show();
        thread::sleep(Duration::from_millis(50));
    };
    progress.end(if status.success() { "done" } else { "failed" });
    if !status.success() {
        for line in last_lines(&path, start_of_output)? {
            eprintln!("  | {line}");
        }
        bail!("`{}` failed with {status}; all of its output is in {}", describe(command), path.display());
    }
    Ok(())
}

/// The file for the output of long commands. What an earlier run of ours left there goes.
fn open_log(path: &Path) -> Result<File> {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| drop(fs::remove_file(path)));
    fs::create_dir_all(path.parent().expect("it is in a directory"))?;
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

fn last_lines(path: &Path, from: u64) -> Result<Vec<String>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut output = Vec::new();
    file.read_to_end(&mut output)?;
    let output = String::from_utf8_lossy(&output);
    let lines: Vec<_> = output.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(SHOWN_LINES)..].iter().map(|&line| line.to_owned()).collect())
}

/// Seconds on one line that changes in place; where that is not possible, a line every half minute.
struct Progress {
    start: Instant,
    terminal: bool,
    shown: u64,
}

impl Progress {
    fn new() -> Self {
        Self { start: Instant::now(), terminal: std::io::stderr().is_terminal(), shown: 0 }
    }

    fn show(&mut self) {
        let seconds = self.start.elapsed().as_secs();
        if self.terminal && seconds > self.shown {
            eprint!("\r  {seconds} s");
            self.shown = seconds;
        } else if seconds >= self.shown + 30 {
            eprintln!("  {seconds} s, still busy");
            self.shown = seconds;
        }
    }

    fn end(&self, how: &str) {
        let back = if self.terminal { "\r" } else { "" };
        eprintln!("{back}  {how} after {:.0} s", self.start.elapsed().as_secs_f64());
    }
}

/// A command as one would type it.
pub fn describe(command: &Command) -> String {
    let program = command.get_program();
    let name = Path::new(program).file_name().unwrap_or(program);
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_files_that_can_be_run() {
        assert!(find_program("sh").is_some_and(|path| path.ends_with("sh")));
        assert!(!is_program(Path::new("/")), "a directory has the same permission bit");
        assert!(!is_program(Path::new("/etc/passwd")));
        assert!(!is_program(Path::new("/nowhere")));
    }

    #[test]
    fn a_failing_command_is_an_error_that_shows_its_message() {
        let mut command = Command::new("sh");
        let error = output(command.args(["-c", "echo why >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with(": why"), "{error}");
    }

    #[test]
    fn only_the_last_lines_after_the_start_are_shown() {
        let path = env::temp_dir().join(format!("xtask-last-lines-{}", std::process::id()));
        let lines: String = (0..40).map(|n| format!("line {n}\n\n")).collect();
        fs::write(&path, format!("before\n{lines}")).unwrap();
        let all = last_lines(&path, 7).unwrap();
        let none = last_lines(&path, fs::metadata(&path).unwrap().len()).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(all.len(), SHOWN_LINES);
        assert_eq!(all.last().unwrap(), "line 39");
        assert!(none.is_empty());
    }
}
