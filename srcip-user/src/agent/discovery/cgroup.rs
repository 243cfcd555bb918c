//! The pod in the name of a cgroup.
//!
//! The kubelet names a pod's cgroup after its UID. With its cgroupfs driver:
//!
//! ```text
//! /kubepods/burstable/podUID/CONTAINER        also besteffort; guaranteed pods are right below kubepods
//! ```
//!
//! With its systemd driver, where `_` stands for `-`:
//!
//! ```text
//! /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice/cri-containerd-CONTAINER.scope
//! ```
//!
//! Both may be below other cgroups (`--cgroup-root`, a kubelet in a container), whose names are then part of
//! a slice's. Seen from another cgroup namespace, what is above that one's root is `..`.

/// CRI-O's monitors: in the pod's cgroup, but not in its namespaces.
const MONITOR_PREFIX: &str = "crio-conmon-";

/// A UID as it is compared here: with `_` for `-`.
pub(super) fn normal(uid: &str) -> String {
    uid.replace('-', "_")
}

/// The UID of a pod, as [`normal`] has it, by its process' `/proc/PID/cgroup`: one line per hierarchy.
/// `None` if there is no pod in it, or if the lines contradict each other.
pub(super) fn pod(cgroups: &[u8]) -> Option<String> {
    let mut found = None;
    for line in cgroups.split(|byte| *byte == b'\n') {
        // `NUMBER:CONTROLLERS:PATH`; most processes are in no pod.
        let Some(path) = line.splitn(3, |byte| *byte == b':').nth(2) else { continue };
        let Some(uid) = std::str::from_utf8(path).ok().and_then(uid_in_path) else { continue };
        match found {
            None => found = Some(uid),
            Some(other) if normal(other) == normal(uid) => {}
            Some(_) => return None,
        }
    }
    found.map(normal)
}

/// The outermost one counts: a container may make cgroups of any name below its own.
fn uid_in_path(path: &str) -> Option<&str> {
    let mut parent = "";
    let mut components = path.split('/').filter(|component| !component.is_empty());
    let uid = components.find_map(|component| {
        let uid = uid_in_slice(component).or_else(|| uid_in_directory(parent, component));
        parent = component;
        uid
    })?;
    (!components.next().is_some_and(|container| container.starts_with(MONITOR_PREFIX))).then_some(uid)
}

/// `podUID`, below a directory that the kubelet makes.
fn uid_in_directory<'a>(parent: &str, name: &'a str) -> Option<&'a str> {
    let is_kubelets = matches!(parent, "kubepods" | "burstable" | "besteffort" | "..");
    name.strip_prefix("pod").filter(|uid| is_kubelets && is_uid(uid))
}

/// `kubepods-burstable-podUID.slice`, with whatever in front.
fn uid_in_slice(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".slice")?;
    let (before, after) = name.split_once("kubepods-")?;
    let class = ["burstable-", "besteffort-"].into_iter().find_map(|class| after.strip_prefix(class));
    let uid = class.unwrap_or(after).strip_prefix("pod")?;
    ((before.is_empty() || before.ends_with('-')) && is_uid(uid)).then_some(uid)
}

fn is_uid(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0f5c2a1e-8d1b-4b52-9f3e-6a1c7d9e0b42";
    const SLICE: &str = "0f5c2a1e_8d1b_4b52_9f3e_6a1c7d9e0b42";

    /// Lines of `/proc/PID/cgroup`, with `UID` and `SLICE` for the UID.
    fn pod_of(text: &str) -> Option<String> {
        pod(text.replace("SLICE", SLICE).replace("UID", UID).as_bytes())
    }

    #[test]
    fn every_layout_is_known() {
        for text in [
            // cgroupfs, v2: the three classes.
            "0::/kubepods/burstable/podUID/3f1d\n",
            "0::/kubepods/besteffort/podUID/3f1d\n",
            "0::/kubepods/podUID/3f1d\n",
            // systemd, v2: containerd, CRI-O.
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podSLICE.slice/cri-containerd-3f1d.scope\n",
            "0::/kubepods.slice/kubepods-podSLICE.slice/cri-containerd-3f1d.scope\n",
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSLICE.slice/crio-3f1d.scope/container\n",
            // v1, and a hybrid whose unified hierarchy knows nothing.
            "12:memory:/kubepods/burstable/podUID/3f1d\n11:cpu,cpuacct:/kubepods/burstable/podUID/3f1d\n1:name=systemd:/kubepods/burstable/podUID/3f1d\n",
            "3:pids:/kubepods.slice/kubepods-podSLICE.slice/docker-3f1d.scope\n0::/system.slice/containerd.service\n",
            // The two drivers' names for one pod.
            "3:pids:/kubepods/podUID/3f1d\n0::/kubepods.slice/kubepods-podSLICE.slice/x.scope\n",
            // A kubelet in a container; --cgroup-root.
            "0::/docker/77aa/kubelet/kubepods/burstable/podUID/3f1d\n",
            "0::/system.slice/docker-77aa.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-podSLICE.slice/cri-containerd-3f1d.scope\n",
            // From a pod's own cgroup namespace: a pod of the same class, and of another.
            "0::/../../podUID/3f1d\n",
            "0::/../../../besteffort/podUID/3f1d\n",
            "0::/../../kubepods-burstable-podSLICE.slice/cri-containerd-3f1d.scope\n",
            // Sub-cgroups of a container's own.
            "0::/kubepods/podUID/3f1d/system.slice/sshd.service\n",
        ] {
            assert_eq!(pod_of(text).as_deref(), Some(SLICE), "{text}");
        }
        let static_pod = "0::/kubepods/burstable/pod6f5c4d0b5ed8c3cf0a4e6b4e51ac3c9d/3f1d\n";
        assert_eq!(pod_of(static_pod).as_deref(), Some("6f5c4d0b5ed8c3cf0a4e6b4e51ac3c9d"));
    }

    #[test]
    fn what_is_no_pod_is_none() {
        for text in [
            "",
            "\n\n",
            "0::/\n",
            "0::/../..\n",
            "0::/init.scope\n",
            "0::/user.slice/user-0.slice/session-1.scope\n",
            "0::/podUID/x\n",
            "0::/user.slice/podUID/x\n",
            "0::/machine.slice/libpod-podUID.scope\n",
            "0::/kubepods/burstable\n",
            "0::/kubepods.slice/kubepods-burstable.slice\n",
            "0::/kubepods/burstable/pod/x\n",
            "0::/notkubepods-podSLICE.slice/x\n",
            "0::/kubepods/burstable/pod../x\n",
            "0:/kubepods/podUID/x\n",
            // CRI-O's monitor, on the host's network.
            "0::/kubepods.slice/kubepods-podSLICE.slice/crio-conmon-3f1d.scope\n",
            // Two pods at once.
            "2:cpu:/kubepods/podUID/x\n1:pids:/kubepods/podaaaa/x\n",
        ] {
            assert_eq!(pod_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_container_cannot_pretend_to_be_in_another_pod() {
        for inner in [
            "kubepods/burstable/podaaaa/3f1d",
            "kubepods.slice/kubepods-podaaaa.slice/x.scope",
            "../podaaaa",
            "kubepods-podaaaa.slice",
        ] {
            for outer in ["kubepods/podUID/3f1d", "kubepods.slice/kubepods-podSLICE.slice/x.scope"] {
                let text = format!("0::/{outer}/{inner}\n");
                assert_eq!(pod_of(&text).as_deref(), Some(SLICE), "{text}");
            }
        }
    }

    proptest! {
        #[test]
        fn anything_is_read_or_not(cgroups: Vec<u8>, text in "[0-9]:(cpu)?:(/(kubepods|pod[a-z-]*|[.]{2}|[^\n]{0,9})){0,6}") {
            let _ = pod(&cgroups);
            if let Some(uid) = pod(text.as_bytes()) {
                prop_assert!(is_uid(&uid));
            }
        }
    }
}
