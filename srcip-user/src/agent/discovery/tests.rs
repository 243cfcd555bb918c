//! Tests with a `/proc` that is made up.

use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

/// Processes that are files.
struct FakeProc(TempDir);

impl FakeProc {
    fn new() -> Self {
        let proc = Self(TempDir::new().unwrap());
        // What else is there.
        fs::create_dir(proc.0.path().join("sys")).unwrap();
        fs::write(proc.0.path().join("uptime"), "1 2").unwrap();
        proc.add(1, 0, 1, "/init.scope");
        proc
    }

    fn add(&self, pid: u32, parent: u32, started: u64, cgroup: &str) {
        let directory = self.0.path().join(pid.to_string());
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("cgroup"), format!("0::{cgroup}\n")).unwrap();
        let zeros = "0 ".repeat(17);
        fs::write(directory.join("stat"), format!("{pid} (a) b) S {parent} {zeros}{started} 0\n")).unwrap();
    }

    /// Gives a process the namespace of a real one.
    fn link_netns(&self, pid: u32, target: &Path) {
        let directory = self.0.path().join(format!("{pid}/ns"));
        fs::create_dir(&directory).unwrap();
        symlink(target, directory.join("net")).unwrap();
    }

    fn candidates(&self, uids: &[&str]) -> BTreeMap<String, Vec<u32>> {
        let wanted = uids.iter().map(|uid| PodUid::new(uid).unwrap()).collect();
        let found = candidates(&mut Reader::new(self.0.path()), &wanted).unwrap();
        let pids = |list: Vec<Process>| list.into_iter().map(|process| process.pid).collect();
        found.into_iter().map(|(uid, list)| (uid.to_string(), pids(list))).collect()
    }

    fn scan(&self, uid: &str) -> Scan {
        scan(self.0.path(), &BTreeSet::from([PodUid::new(uid).unwrap()])).unwrap()
    }
}

#[test]
fn the_oldest_process_from_outside_is_the_sandbox() {
    let proc = FakeProc::new();
    proc.add(50, 1, 10, "/system.slice/containerd.service");
    // A runtime's shim has started the application, its child, a sandbox with a wrapped number, and an exec.
    proc.add(300, 50, 200, "/kubepods/burstable/poda-1/app");
    proc.add(301, 300, 205, "/kubepods/burstable/poda-1/app");
    proc.add(400, 50, 100, "/kubepods/burstable/poda-1/pause");
    proc.add(401, 50, 900, "/kubepods/burstable/poda-1/app");
    // Another pod, and one that nobody has asked for.
    proc.add(500, 50, 5, "/kubepods.slice/kubepods-podb_2.slice/cri-containerd-x.scope");
    proc.add(600, 50, 1, "/kubepods/podc-3/x");
    let expected = BTreeMap::from([("a-1".to_owned(), vec![400, 300, 401]), ("b-2".to_owned(), vec![500])]);
    assert_eq!(proc.candidates(&["a-1", "b-2", "gone"]), expected);
}

#[test]
fn processes_without_files_are_passed_over() {
    let proc = FakeProc::new();
    proc.add(7, 1, 1, "/kubepods/poda/x");
    fs::remove_file(proc.0.path().join("7/stat")).unwrap();
    fs::create_dir(proc.0.path().join("8")).unwrap();
    fs::create_dir(proc.0.path().join("99999999999")).unwrap();
    assert!(proc.candidates(&["a"]).is_empty());
    let scan = proc.scan("a");
    assert!(scan.found.is_empty() && scan.failed.is_empty());
}

#[test]
fn the_hosts_namespace_is_nobodys() {
    let own = Path::new("/proc/self/ns/net");
    let proc = FakeProc::new();
    proc.add(7, 1, 1, "/kubepods/poda/x");
    proc.link_netns(7, own);
    let found = proc.scan("a").found;
    assert_eq!(found[&PodUid::new("a").unwrap()].id(), Netns::open(own).unwrap().id());
    // Now it is the namespace of the first process.
    proc.link_netns(1, own);
    assert!(proc.scan("a").found.is_empty());
}

#[test]
fn the_next_oldest_is_tried_and_failures_are_told() {
    let proc = FakeProc::new();
    proc.add(7, 1, 1, "/kubepods/poda/ended");
    proc.add(8, 1, 2, "/kubepods/poda/odd");
    proc.link_netns(8, Path::new("/proc/self/ns/mnt"));
    let scan = proc.scan("a");
    assert!(scan.found.is_empty() && scan.failed.len() == 1, "{scan:?}");
    proc.add(9, 1, 3, "/kubepods/poda/x");
    proc.link_netns(9, Path::new("/proc/self/ns/net"));
    let scan = proc.scan("a");
    assert_eq!(scan.found.len(), 1);
    assert!(scan.failed.is_empty());
}

#[test]
fn a_proc_that_cannot_be_read_is_an_error() {
    let wanted = BTreeSet::from([PodUid::new("a").unwrap()]);
    assert!(scan(Path::new("/nowhere/proc"), &wanted).is_err());
}
