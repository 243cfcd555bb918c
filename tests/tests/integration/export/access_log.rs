//! The access log: whole lines, rotation, full disks, readers that go.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use srcip_tests::{Family, PATIENCE, proxy::Kind};

use super::{Export, command, connections, visit, wait_for, wait_for_value};
use crate::scenario::{Engine, PORT, Scenario};

/// The records of a file, each of which has to be a whole line.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends within a line", path.display());
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line:?}"))).collect()
}

fn of_leg<'a>(records: &'a [Value], leg: &str, event: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["leg"] == leg && record["event"] == event).collect()
}

/// The files of a log, the current one first.
fn files(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let mut files: Vec<_> = fs::read_dir(path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&name))
        .collect();
    files.sort();
    files
}

/// A line per leg when it ends, with all four addresses; if asked for, one when it opens.
#[test]
fn a_line_for_every_connection() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    for (options, opened) in [("", 0), ("--access-log-events open,close", 5)] {
        let path = scenario.world.directory().join(format!("access{opened}.json"));
        let export = Export::start(&scenario, &format!("--access-log {} {options}", path.display()));
        visit(&scenario, 5);
        wait_for_value(&scenario, &connections(scenario.pod.name(), "upstream", "true"), 5.);
        wait_for_value(&scenario, &connections(scenario.pod.name(), "downstream", "true"), 5.);
        export.stop();
        let records = records(&path);
        for leg in ["downstream", "upstream"] {
            let closed = of_leg(&records, leg, "close");
            assert_eq!((closed.len(), of_leg(&records, leg, "open").len()), (5, opened), "{leg} {records:?}");
            for record in closed {
                let client = scenario.client.address(Family::V4).to_string();
                let pod = scenario.pod.socket(Family::V4, PORT).to_string();
                let text = |key: &str| record[key].as_str().unwrap_or_else(|| panic!("{key}: {record}"));
                assert!(text("downstream_remote_address").starts_with(&client), "{record}");
                assert!(text("upstream_local_address").starts_with(&client), "{record}");
                assert_eq!((text("downstream_local_address"), text("upstream_host")), (&*pod, &*pod));
                assert_eq!(record["preserved"], true, "{record}");
                assert!(record["bytes_received"].as_u64().is_some(), "{record}");
            }
        }
        assert_eq!(records.len(), 10 + 2 * opened);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777 & !0o640, 0);
    }
}

/// Rotated many times: so many files, none too large, no line broken, and the last lines are the youngest.
#[test]
fn rotation_keeps_lines_whole_and_files_few() {
    const SIZE: u64 = 4096;
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let path = scenario.world.directory().join("rotated.json");
    let options =
        format!("--access-log {} --access-log-max-size 4KiB --access-log-max-files 3", path.display());
    let export = Export::start(&scenario, &options);
    visit(&scenario, 40);
    wait_for_value(&scenario, &connections(scenario.pod.name(), "upstream", "true"), 40.);
    let page = wait_for_value(&scenario, "srcip_access_log_lines_total", 80.);
    assert_eq!(super::value(&page, r#"srcip_access_log_errors_total{reason="write"}"#), Some(0.));
    export.stop();
    let files = files(&path);
    assert_eq!(files.len(), 3, "{files:?}");
    let mut times = Vec::new();
    for file in files.iter().rev() {
        let metadata = fs::metadata(file).unwrap();
        assert!(metadata.len() <= SIZE, "{}: {}", file.display(), metadata.len());
        assert_eq!(metadata.permissions().mode() & 0o777 & !0o640, 0, "{}", file.display());
        times.extend(records(file).into_iter().map(|record| record["time"].as_str().unwrap().to_owned()));
    }
    // Rotated files are nearly full: 4 KiB have several lines.
    assert!(times.len() > 8 && times.len() < 80, "{}", times.len());
    assert!(times.is_sorted_by(|a, b| a[..22] <= b[..22]), "{times:?}");
}

/// A file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=16k")).unwrap();
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A full disk is told of once and counted; with room again, the log goes on, all lines whole.
#[test]
fn a_full_disk_is_no_end() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let disk = Small::mount(scenario.world.directory().join("disk"));
    let path = disk.0.join("full.json");
    let export = Export::start(&scenario, &format!("--access-log {}", path.display()));
    visit(&scenario, 30);
    let pod = scenario.pod.name();
    wait_for_value(&scenario, &connections(pod, "upstream", "true"), 30.);
    let page = wait_for_value(&scenario, &connections(pod, "downstream", "true"), 30.);
    let written = wait_for("all lines were tried", || {
        let page = super::scrape(&scenario);
        let written = super::value(&page, "srcip_access_log_lines_total")?;
        let lost = super::value(&page, r#"srcip_access_log_errors_total{reason="write"}"#)?;
        (written + lost == 60.).then_some(written)
    });
    assert!(written > 10. && written < 60., "{page}");
    assert_eq!(records(&path).len() as f64, written);
    fs::remove_file(&path).unwrap();
    visit(&scenario, 2);
    wait_for("the log goes on", || (path.exists() && records(&path).len() == 4).then_some(()));
    let log = export.stop();
    assert_eq!(log.matches("cannot write the access log").count(), 1, "{log}");
    assert!(log.contains("No space left"), "{log}");
}

/// Who reads stdout gets whole lines; when he goes, the exporter ends, and that is no error.
#[test]
fn stdout_that_nobody_reads_any_more_ends_it() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    for idle in [false, true] {
        let mut command = command(&scenario, &[&scenario.pod], "--access-log - --metrics-address none");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        assert_eq!(said.next().unwrap().unwrap(), "exporting");
        visit(&scenario, 1);
        for _ in 0..2 {
            let line = lines.next().unwrap().unwrap();
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["event"], "close", "{line}");
        }
        drop(lines);
        let start = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if !idle {
                visit(&scenario, 1);
            }
            assert!(start.elapsed() < PATIENCE, "it still runs, idle: {idle}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let rest: Vec<_> = said.map(Result::unwrap).collect();
        assert_eq!((child.wait().unwrap().code(), rest), (Some(0), Vec::new()), "idle: {idle}");
    }
}

/// A reader of stdout that stops reading holds up neither the metrics nor the end.
#[test]
fn a_reader_that_stalls_holds_nothing_up() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let mut command = command(&scenario, &[&scenario.pod], "--access-log -");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap() == "exporting"));
    // A pipe has room for 64 KiB, some hundred lines.
    visit(&scenario, 150);
    let pod = scenario.pod.name();
    wait_for_value(&scenario, &connections(pod, "upstream", "true"), 150.);
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
