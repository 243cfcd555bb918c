//! `cargo xtask run`: what it shows, and that nothing is left of it, however it ends.

use std::{fs, process::ExitStatus, time::Duration};

use nix::sys::signal::Signal;
use srcip_tests::{host::Host, process::Process, srcip::binary, world::World};

/// One takes seconds, and some of them go on at once.
const PATIENCE: Duration = Duration::from_secs(300);

/// Somebody at a terminal, whose programs end with the test.
struct Operator {
    host: Host,
    /// Last, so that it goes last.
    _world: World,
}

impl Operator {
    fn new() -> Self {
        let mut world = World::new().unwrap();
        Self { host: world.host("operator").unwrap(), _world: world }
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Process {
        let mut command = self.host.command(&binary("srcip-demo").display().to_string()).unwrap();
        command.args(arguments);
        self.host.start(name, command).unwrap()
    }
}

fn end(demonstration: &mut Process) -> ExitStatus {
    demonstration.wait(PATIENCE).unwrap()
}

/// Namespaces, directories and cgroups of a run.
fn left_behind(pid: u32) -> Vec<String> {
    let prefix = format!("srcip-{pid}-");
    let cgroups = srcip_user::dataplane::hooks::cgroup_root().unwrap();
    let places = ["/run/netns".into(), "/run/srcip-worlds".into(), cgroups];
    let entries = places.into_iter().flat_map(|place| fs::read_dir(place).into_iter().flatten().flatten());
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

/// The rows of the table: the view, then the words for it before and after.
fn rows(log: &str) -> Vec<(String, [&str; 2])> {
    let table = log.lines().skip_while(|line| !line.starts_with("VIEW")).skip(1);
    let rows = table.take_while(|line| !line.is_empty()).map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [view @ .., _, before, _, after] = &words[..] else { panic!("not a row: {line:?}") };
        (view.join(" "), [*before, *after])
    });
    rows.collect()
}

#[test]
fn a_sidecar_is_shown_before_and_after() {
    let operator = Operator::new();
    let mut demonstration = operator.start("demo", &["--once"]);
    assert!(end(&mut demonstration).success(), "{}", demonstration.log());
    let log = demonstration.log();
    let rows = rows(&log);
    assert_eq!(rows.len(), 9, "{log}");
    assert!(rows.contains(&("application's answer".to_owned(), ["lost", "kept"])), "{log}");
    assert_eq!(left_behind(demonstration.pid()), [""; 0]);
}

#[test]
fn north_south_is_shown_before_and_after_by_two_at_once() {
    let operator = Operator::new();
    let start = |name| operator.start(name, &["--north-south", "--once"]);
    for mut demonstration in ["one", "two"].map(start) {
        assert!(end(&mut demonstration).success(), "{}", demonstration.log());
        let log = demonstration.log();
        let rows = rows(&log);
        for family in ["", "IPv6 "] {
            for scheme in ["HTTP", "HTTPS"] {
                for view in ["application's answer", "downstream_remote_address", "x_forwarded_for"] {
                    let row = (format!("{family}{scheme} {view}"), ["lost", "kept"]);
                    assert!(rows.contains(&row), "no {row:?}: {log}");
                }
            }
        }
        assert_eq!(rows.len(), 12, "{log}");
        assert!(log.contains("srcip explain") && log.contains("sees 198.51.100.10:50000 at "), "{log}");
        assert_eq!(left_behind(demonstration.pid()), [""; 0]);
    }
}

#[test]
fn north_south_goes_on_until_it_is_interrupted() {
    let operator = Operator::new();
    let mut demonstration = operator.start("demo", &["--north-south"]);
    let requests =
        |log: &str| log.lines().filter(|line| line.contains("://") && line.ends_with("kept")).count();
    demonstration
        .wait_until("asks for all, more than twice", |process| requests(&process.log()) > 10)
        .unwrap();
    let log = demonstration.log();
    assert!(log.lines().any(|line| line.trim().starts_with("srcip: connections: ")), "{log}");
    demonstration.signal(Signal::SIGINT).unwrap();
    let status = end(&mut demonstration);
    let log = demonstration.log();
    assert!(status.success(), "{log}");
    let summary = log.lines().find_map(|line| line.strip_prefix("requests: ")).expect("a summary");
    let (all, kept) = summary.split_once(", with the client's address: ").unwrap();
    assert_eq!(all, kept, "{log}");
    assert_eq!(left_behind(demonstration.pid()), [""; 0]);
}

#[test]
fn north_south_that_is_interrupted_on_the_way_leaves_nothing() {
    let operator = Operator::new();
    let mut demonstration = operator.start("demo", &["--north-south"]);
    demonstration.wait_until("begins", |process| process.log().contains("BEFORE")).unwrap();
    demonstration.signal(Signal::SIGTERM).unwrap();
    assert_eq!(end(&mut demonstration).code(), Some(128 + 15), "{}", demonstration.log());
    assert_eq!(left_behind(demonstration.pid()), [""; 0]);
}

#[test]
fn what_a_killed_one_leaves_the_next_removes() {
    let operator = Operator::new();
    let mut killed = operator.start("killed", &["--north-south"]);
    killed.wait_until("shows srcip's status", |process| process.log().contains("srcip status")).unwrap();
    // Another one that begins removes it as soon as nobody is left.
    assert!(!left_behind(killed.pid()).is_empty());
    killed.kill();
    let mut next = operator.start("next", &["--north-south", "--once"]);
    assert!(end(&mut next).success(), "{}", next.log());
    assert_eq!(left_behind(killed.pid()), [""; 0]);
    assert_eq!(left_behind(next.pid()), [""; 0]);
}
