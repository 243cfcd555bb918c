//! A directory of manifests: how its files change.

use std::{fs, os::unix::fs::symlink, path::Path, time::Duration};

use super::*;

fn rig(prepare: impl FnOnce(&Path)) -> Rig {
    Rig::new(Kind::Manifests, |place| prepare(&place.directory))
}

impl Rig {
    fn file(&self, name: &str) -> PathBuf {
        manifests_of(&self.scratch).join(name)
    }

    /// Writes a file as a whole: it is never seen empty.
    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        let half = self.file(&format!(".{name}"));
        fs::write(&half, text).unwrap();
        fs::rename(half, self.file(name)).unwrap();
    }
}

/// Pods in one file, as YAML with several documents.
fn yaml(names: &[&str]) -> String {
    names.iter().map(|name| format!("---\n{}\n", pod(name))).collect()
}

#[test]
fn files_may_have_many_objects_of_many_kinds() {
    let mut rig = rig(|directory| {
        fs::write(directory.join("a.yaml"), yaml(&["a", "b"])).unwrap();
        let list = json!({ "kind": "List", "items": [pod("c"), { "kind": "ConfigMap", "data": {} }] });
        fs::write(directory.join("b.json"), list.to_string()).unwrap();
        fs::write(directory.join("readme.txt"), "kind: [").unwrap();
        fs::write(directory.join(".hidden.yaml"), "kind: [").unwrap();
    });
    let snapshot = rig.until_pods(&["a", "b", "c"]);
    assert_eq!(snapshot.trouble, None);
}

#[test]
fn services_and_endpoint_slices_are_kept_if_they_are_valid() {
    let scratch = Scratch::new().unwrap();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": { "name": "web-1" },
        "addressType": "IPv4", "endpoints": [{ "addresses": ["10.0.0.9"] }],
    });
    let service =
        json!({ "kind": "Service", "metadata": { "name": "web" }, "spec": { "ports": [{ "port": 80 }] } });
    let invalid = json!({ "kind": "Service", "metadata": { "name": "bad" }, "spec": { "ports": "all" } });
    let objects = json!({ "kind": "List", "items": [slice, invalid, service, pod("a")] });
    fs::write(scratch.path().join("all.yaml"), objects.to_string()).unwrap();
    let background = Background::start();
    background.wait(async {
        let source = ManifestSource::start(scratch.path(), Some(NODE), manifest_timing());
        let mut services = source.services();
        let known = tokio::time::timeout(SOON, services.wait_for(|known| !known.services.is_empty()));
        let known = known.await.unwrap().unwrap().clone();
        assert_eq!(known.services[0].metadata.name.as_deref(), Some("web"));
        assert_eq!(known.services.len(), 1);
        assert_eq!(known.endpoint_slices[0].address_type, "IPv4");
    });
}

#[test]
fn a_file_that_breaks_keeps_its_pods_and_stops_no_other() {
    let mut rig = rig(|directory| {
        fs::write(directory.join("a.yaml"), yaml(&["a"])).unwrap();
        fs::write(directory.join("b.yaml"), yaml(&["b"])).unwrap();
    });
    rig.until_pods(&["a", "b"]);
    rig.write("a.yaml", "kind: Pod\nmetadata: {name: [");
    let snapshot = rig.until("trouble", |snapshot| snapshot.trouble.is_some());
    let why = snapshot.trouble.clone().unwrap();
    assert!(why.contains("a.yaml is not YAML") && why.contains("still holds"), "{why}");
    assert_eq!(names(&snapshot), ["a", "b"]);
    rig.write("b.yaml", yaml(&["c"]));
    rig.until_pods(&["a", "c"]);
    rig.write("a.yaml", yaml(&["d"]));
    let snapshot = rig.until_pods(&["c", "d"]);
    assert_eq!(snapshot.trouble, None);
}

#[test]
fn not_all_is_known_while_a_file_could_never_be_read() {
    let mut rig = rig(|directory| {
        fs::write(directory.join("a.yaml"), yaml(&["a"])).unwrap();
        fs::write(directory.join("b.yaml"), "kind: [").unwrap();
    });
    let snapshot = rig.until("the pod that can be read", |snapshot| names(snapshot) == ["a"]);
    assert!(!snapshot.synced && snapshot.trouble.is_some(), "{snapshot:?}");
    rig.write("b.yaml", yaml(&["b"]));
    rig.until_pods(&["a", "b"]);
}

#[test]
fn a_file_that_is_being_written_is_waited_for() {
    let scratch = Scratch::new().unwrap();
    let file = scratch.path().join("a.yaml");
    fs::write(&file, yaml(&["a", "b"])).unwrap();
    let background = Background::start();
    background.wait(async {
        // So long that no machine is too busy.
        let timing = manifest_source::Timing { settle: Duration::from_secs(10), ..manifest_timing() };
        let source = ManifestSource::start(scratch.path(), Some(NODE), timing);
        let mut seen = source.watch();
        let all = tokio::time::timeout(SOON, seen.wait_for(|snapshot| snapshot.pods.len() == 2)).await;
        drop(all.unwrap().unwrap());
        // Every step makes sense by itself, and lacks a pod.
        for names in [["a"].as_slice(), &["b"], &["a", "b", "c"]] {
            fs::write(&file, yaml(names)).unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let mut fewest = usize::MAX;
        let all = tokio::time::timeout(
            SOON,
            seen.wait_for(|snapshot| {
                fewest = fewest.min(snapshot.pods.len());
                snapshot.pods.len() == 3
            }),
        );
        drop(all.await.unwrap().unwrap());
        assert_eq!(fewest, 2);
    });
}

#[test]
fn a_file_that_is_emptied_keeps_its_pods_until_it_is_removed() {
    let mut rig = rig(|directory| fs::write(directory.join("a.yaml"), yaml(&["a"])).unwrap());
    rig.until_pods(&["a"]);
    rig.write("a.yaml", "");
    let snapshot = rig.until("trouble", |snapshot| snapshot.trouble.is_some());
    assert!(snapshot.trouble.as_ref().unwrap().contains("has nothing in it any more"), "{snapshot:?}");
    assert_eq!(names(&snapshot), ["a"]);
    fs::remove_file(rig.file("a.yaml")).unwrap();
    let snapshot = rig.until_pods(&[]);
    assert_eq!(snapshot.trouble, None);
}

#[test]
fn a_configmaps_volume_is_followed_when_its_link_is_replaced() {
    let volume = |directory: &Path, version: &str, names: &[&str]| {
        let data = directory.join(format!("..{version}"));
        fs::create_dir(&data).unwrap();
        fs::write(data.join("pods.yaml"), yaml(names)).unwrap();
        symlink(format!("..{version}"), directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    let mut rig = rig(|directory| {
        volume(directory, "1", &["a"]);
        symlink("..data/pods.yaml", directory.join("pods.yaml")).unwrap();
    });
    rig.until_pods(&["a"]);
    let directory = manifests_of(&rig.scratch);
    volume(&directory, "2", &["b"]);
    fs::remove_dir_all(directory.join("..1")).unwrap();
    let snapshot = rig.until_pods(&["b"]);
    assert_eq!(snapshot.trouble, None);
}

#[test]
fn a_pod_without_a_uid_needs_the_kubelets_hash() {
    let mut rig = rig(|directory| {
        let without = |name: &str| {
            let mut pod = pod(name);
            pod["metadata"]["uid"] = Value::Null;
            pod
        };
        let mut hashed = without("static");
        hashed["metadata"]["annotations"]["kubernetes.io/config.hash"] = "0123abcd".into();
        fs::write(directory.join("static.yaml"), hashed.to_string()).unwrap();
        fs::write(directory.join("none.yaml"), without("none").to_string()).unwrap();
    });
    let snapshot = rig.until_pods(&["static"]);
    let pod = snapshot.pods.values().next().unwrap();
    assert_eq!((pod.uid.as_str(), pod.node_uid.as_str()), ("0123abcd", "0123abcd"));
}

#[test]
fn a_pod_without_a_node_is_this_nodes() {
    let mut rig = rig(|directory| {
        fs::write(directory.join("a.yaml"), pod_with("a", "/spec/nodeName", Value::Null).to_string())
            .unwrap();
    });
    rig.until_pods(&["a"]);
}

#[test]
fn of_two_pods_with_the_same_uid_the_first_is_taken() {
    let mut rig = rig(|directory| {
        for name in ["b", "a"] {
            let pod = pod_with(name, "/metadata/uid", "same");
            fs::write(directory.join(format!("{name}.yaml")), pod.to_string()).unwrap();
        }
    });
    rig.until_pods(&["a"]);
    rig.place().delete("a");
    rig.until_pods(&["b"]);
}

#[test]
fn what_is_no_file_is_trouble_and_keeps_nobody_waiting() {
    let mut rig = rig(|directory| {
        fs::write(directory.join("a.yaml"), yaml(&["a"])).unwrap();
        nix::unistd::mkfifo(&directory.join("b.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    });
    let snapshot =
        rig.until("trouble, and a pod", |snapshot| snapshot.trouble.is_some() && names(snapshot) == ["a"]);
    assert!(snapshot.trouble.as_ref().unwrap().contains("b.yaml is no file"), "{snapshot:?}");
}
