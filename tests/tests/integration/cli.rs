//! The command line: errors that teach, stable names, exit codes.

use std::process::{Command, Stdio};

use serde_json::Value;
use srcip_tests::{
    Family,
    process::{run, sh},
    proxy::Kind,
    srcip::binary,
    world::World,
};

use crate::{
    detach::traces,
    scenario::{Engine, Scenario},
};

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn mistakes_in_arguments() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let attach = |options: &str| {
        let netns = scenario.pod.path();
        scenario.srcip.fail(&format!("attach --netns {} {options}", netns.display())).unwrap()
    };
    assert_says(&attach("--proxy-port 0"), &["\"0\" is not a TCP port", "from 1 to 65535"]);
    assert_says(&attach("--proxy-port 70000"), &["\"70000\" is not a TCP port"]);
    let ports = "--proxy-port 15006 --include-inbound-ports";
    assert_says(
        &attach(&format!("{ports} 8000-7000")),
        &["ends before it starts", "did you mean 7000-8000?"],
    );
    assert_says(&attach(&format!("{ports}=")), &["the list of ports is empty", "8080,9000-9010"]);
    assert_says(&attach(&format!("{ports} 80,http")), &["\"http\" is not a TCP port"]);
    assert_says(&attach("--proxy-port 15006 --mark 0"), &["0 means no mark"]);
    assert_says(&attach("--proxy-port 15006 --route-table main"), &["is not a routing table"]);
    assert_says(&attach("--proxy-port 15006 --upstream-ports 1-9,5-12"), &["1-9 and 5-12 overlap"]);
    assert_says(&attach(""), &["required", "--proxy-port"]);
    assert_says(&scenario.srcip.fail("attach --proxy-port 15006").unwrap(), &["--netns", "--pid"]);
    assert!(!scenario.srcip.pin_path().exists());
}

#[test]
fn mistakes_about_the_namespace() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let attach =
        |path: &str| scenario.srcip.fail(&format!("attach --netns {path} --proxy-port 15006")).unwrap();
    assert_says(
        &attach("/run/netns/no-such-pod"),
        &["/run/netns/no-such-pod: no such file", "ip netns list"],
    );
    assert_says(&attach("/etc/hostname"), &["/etc/hostname is not a network namespace", "/proc/PID/ns/net"]);
    assert_says(&attach("/proc/self/ns/mnt"), &["is not a network namespace"]);
    let host = "/proc/self/ns/net is the host's own network namespace";
    assert_says(&attach("/proc/self/ns/net"), &[host, "--host-netns"]);
    let error = scenario.srcip.fail("attach --pid 4194305 --proxy-port 15006").unwrap();
    assert_says(&error, &["/proc/4194305/ns/net: no such file"]);
    let error = scenario.srcip.fail("detach --name nobody").unwrap();
    assert_says(&error, &["nobody is not attached", "srcip status"]);
    assert!(!scenario.srcip.pin_path().exists());
}

#[test]
fn no_root_no_capability() {
    let scenario = Scenario::empty(Engine::SkLookup);
    // A copy where anybody may run it. Not made by this process: what another test starts meanwhile would have it open
    // for writing, for a moment, and nobody could run it.
    let copy = scenario.world.directory().join("srcip");
    sh(&format!("cp {} {}", binary("srcip").display(), copy.display())).unwrap();
    sh(&format!("chmod 755 {} {}", scenario.world.directory().display(), copy.display())).unwrap();
    let as_nobody = |arguments: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&copy);
        command.args(arguments.split_whitespace()).output().unwrap()
    };
    for verb in ["attach --netns /run/netns/x --proxy-port 1", "status", "cleanup", "detach --all"] {
        let output = as_nobody(verb);
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let verb = verb.split(' ').next().unwrap();
        assert_says(&error, &["CAP_BPF", "CAP_NET_ADMIN", "run it as root", &format!("sudo srcip {verb}")]);
    }
    let output = as_nobody("doctor");
    assert_eq!(output.status.code(), Some(2));
    assert_says(&String::from_utf8_lossy(&output.stdout), &["missing", "CAP_BPF", "run as root"]);
    // What needs no privilege works without.
    assert!(as_nobody("version").status.success());
}

/// The capabilities that the documentation lists are enough.
#[test]
fn the_listed_capabilities_suffice() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    let with_capabilities = |arguments: &str| {
        let capabilities = "-all,+net_admin,+sys_admin,+perfmon,+bpf";
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", capabilities, "--inh-caps", "-all"]).arg(binary("srcip"));
        command.args(arguments.split_whitespace()).arg("--pin-path").arg(scenario.srcip.pin_path());
        run(&mut command).unwrap()
    };
    for engine in ["sk-lookup", "tc"] {
        let options = format!("--engine {engine}");
        with_capabilities(&scenario.srcip.attach_arguments(&scenario.pod, &options));
        scenario.assert_kept(Family::V4);
        with_capabilities("status");
        with_capabilities("detach --all --now");
        scenario.assert_direct(Family::V4);
    }
}

#[test]
fn warnings_of_attach() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let attach = |options: &str| {
        let arguments = scenario.srcip.attach_arguments(&scenario.pod, options);
        let output = scenario.srcip.output(&arguments).unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(attach(""), "");
    let warning = attach("--upstream-ports 50000-65535");
    assert_says(
        &warning,
        &["warning: the upstream ports 50000-65535 overlap the ephemeral range 32768-60999"],
    );
    scenario.pod.ip("rule add fwmark 0x539/0xfff lookup 100").unwrap();
    scenario.pod.ip("route add 192.0.2.0/24 dev eth0 table 133").unwrap();
    let warning = attach("");
    assert_says(&warning, &["another component's IPv4 rule", "fwmark 0x539/0xfff", "choose another --mark"]);
    assert_says(&warning, &["table 133 holds 1 routes of another component"]);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    // What is not ours stays.
    assert!(scenario.pod.sh("ip rule").unwrap().contains("fwmark 0x539/0xfff lookup 100"));
    assert!(scenario.pod.sh("ip route show table 133").unwrap().contains("192.0.2.0/24"));
}

#[test]
fn names_and_conflicts() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    let other = scenario.world.host("other").unwrap();
    scenario.attach("--name web");
    let error = scenario.srcip.fail(&scenario.srcip.attach_arguments(&other, "--name web")).unwrap();
    assert_says(&error, &["the name \"web\" is taken by the attachment of /run/netns/srcip-"]);
    let root = srcip_user::dataplane::hooks::cgroup_root().unwrap();
    let options = format!("--cgroup {}", root.display());
    let error = scenario.srcip.fail(&scenario.srcip.attach_arguments(&other, &options)).unwrap();
    assert_says(&error, &["the hooks of this instance are attached to the cgroup", "--pin-path"]);
    let error = scenario.srcip.fail(&scenario.srcip.attach_arguments(&other, "--cgroup /tmp")).unwrap();
    assert_says(&error, &["failed to use the cgroup /tmp", "not a directory of cgroup v2"]);
    // A failed attach leaves nothing, and the other attachment alone.
    assert_eq!(other.sh("ip rule").unwrap().matches("fwmark").count(), 0);
    assert_eq!(scenario.srcip.status(&scenario.pod).unwrap()["name"], "web");
    scenario.srcip.run("detach --name web --now").unwrap();
    assert!(!scenario.srcip.pin_path().exists());
}

/// The cgroup with the hooks is removed, and comes back as another one.
#[test]
fn a_cgroup_that_has_been_replaced() {
    let mut scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    let cgroup = scenario.world.cgroup().join("inner");
    std::fs::create_dir(&cgroup).unwrap();
    let other = scenario.world.host("other").unwrap();
    scenario.srcip.attach(&other, &format!("--cgroup {}", cgroup.display())).unwrap();
    let attach = || scenario.srcip.attach(&scenario.pod, &format!("--cgroup {}", cgroup.display()));
    attach().unwrap();
    let problems = || scenario.srcip.status(&scenario.pod).unwrap()["problems"].to_string();
    assert_eq!(problems(), "[]");
    std::fs::remove_dir(&cgroup).unwrap();
    assert_says(&problems(), &["the cgroup", "inner has been removed", "attach again"]);
    std::fs::create_dir(&cgroup).unwrap();
    attach().unwrap();
    assert_eq!(problems(), "[]");
    // The other pod has the same new hooks, and nobody replaces them once more.
    let hook = || {
        let pin = scenario.srcip.pin_path().join("node/srcip_sock_ops");
        let link = aya::programs::links::PinnedLink::from_pin(pin).unwrap();
        aya::programs::links::FdLink::from(link).info().unwrap().id()
    };
    let before = hook();
    assert_eq!(scenario.srcip.status(&other).unwrap()["problems"].to_string().matches("cgroup").count(), 0);
    attach().unwrap();
    assert_eq!(hook(), before);
    // The hooks are at work again: a proxy in there is served.
    let proxy = scenario.proxy.as_ref().unwrap().process().pid();
    std::fs::write(cgroup.join("cgroup.procs"), proxy.to_string()).unwrap();
    scenario.assert_kept(Family::V4);
    std::fs::write(scenario.world.cgroup().join("cgroup.procs"), proxy.to_string()).unwrap();
    scenario.srcip.run("detach --all --now").unwrap();
    std::fs::remove_dir(&cgroup).unwrap();
}

#[test]
fn pins_that_are_no_bpffs() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let mut command = scenario.srcip.command(&scenario.srcip.attach_arguments(&scenario.pod, ""));
    // The last one given is not accepted twice, so by hand.
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let wrong = scenario.world.directory().join("not-bpffs");
    command = Command::new(binary("srcip"));
    command.args(&arguments[..arguments.len() - 1]).arg(&wrong);
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert_says(
        &error,
        &["not-bpffs is not on a BPF file system", "mount -t bpf bpf /sys/fs/bpf", "--pin-path"],
    );
    assert!(!wrong.exists());
}

/// A container has a root of cgroups of its own; hooks belong on the host's, where that is mounted.
#[test]
fn the_hosts_cgroups_from_a_container() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let root = srcip_user::dataplane::hooks::cgroup_root().unwrap();
    // In a cgroup namespace of its own, with that namespace's root mounted as well, before the host's.
    let script = format!(
        "mkdir -p {0}/own && mount -t cgroup2 none {0}/own && mkdir -p {0}/host && \
         mount --bind {1} {0}/host && umount -l {1} && {2} doctor -o json",
        scenario.world.directory().display(),
        root.display(),
        binary("srcip").display()
    );
    let mut command = scenario.pod.command("unshare").unwrap();
    let output = command.args(["--mount", "--cgroup", "sh", "-c", &script]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let host = scenario.world.directory().join("host").display().to_string();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "cgroup v2").unwrap();
    assert_eq!(check["found"], host, "{report}");
}

/// Where the default bpffs is not mounted, attach mounts it.
#[test]
fn a_bpffs_that_is_not_mounted() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let srcip = binary("srcip").display().to_string();
    let pins = format!("--pin-path /sys/fs/bpf/{}", scenario.pod.name());
    let attach = format!(
        "{srcip} attach --netns {} --proxy-port 15006 --cgroup {} {pins}",
        scenario.pod.path().display(),
        scenario.world.cgroup().display()
    );
    // In a mount namespace of its own, with a /sys that has nothing mounted on it.
    let script = format!(
        "mount -t sysfs sysfs /sys && mount -t cgroup2 none {} 2>/dev/null || \
         mount -t tmpfs none /sys/fs/cgroup && mkdir -p {0} && mount -t cgroup2 none {0}; \
         {attach} && stat -f -c %T /sys/fs/bpf && {srcip} status {pins} && {srcip} detach --all --now {pins}",
        srcip_user::dataplane::hooks::cgroup_root().unwrap().display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert_says(&said, &["attached: inbound ports", "bpf_fs", "Attached", "detached"]);
}

#[test]
fn pins_of_another_version() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let before = traces(&scenario.pod);
    scenario.attach("");
    let layout = scenario.srcip.pin_path().join("maps/LAYOUT");
    let mut map: aya::maps::Array<_, u32> =
        aya::maps::Array::try_from(aya::maps::Map::Array(aya::maps::MapData::from_pin(layout).unwrap()))
            .unwrap();
    map.set(0, 77, 0).unwrap();
    let attach = scenario.srcip.attach_arguments(&scenario.pod, "");
    for verb in [attach.as_str(), "status", "detach --all"] {
        let error = scenario.srcip.fail(verb).unwrap();
        assert_says(
            &error,
            &["left by another version of srcip", "map layout 77, this one uses", "srcip cleanup"],
        );
    }
    // Cleanup takes back what that version did to the pod as well.
    scenario.srcip.run("cleanup").unwrap();
    assert!(!scenario.srcip.pin_path().exists());
    assert_eq!(traces(&scenario.pod), before);
    scenario.attach("");
}

/// An object whose first instruction of `sk_lookup` reads a register that nobody has written.
#[test]
fn a_program_the_verifier_rejects() {
    use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
    let scenario = Scenario::empty(Engine::SkLookup);
    let mut bytes = srcip_user::EBPF_OBJECT.to_vec();
    let at = {
        let file = object::File::parse(&bytes[..]).unwrap();
        let section = file.sections().find(|s| s.name() == Ok("sk_lookup")).unwrap();
        let symbol = file.symbols().find(|s| s.name() == Ok("srcip_sk_lookup")).unwrap();
        (section.file_range().unwrap().0 + symbol.address()) as usize
    };
    // `r0 = r9`: BPF_ALU64 | BPF_MOV | BPF_X.
    bytes[at..at + 8].copy_from_slice(&[0xbf, 0x90, 0, 0, 0, 0, 0, 0]);
    let path = scenario.world.directory().join("bad.o");
    std::fs::write(&path, bytes).unwrap();
    let mut command = scenario.srcip.command(&scenario.srcip.attach_arguments(&scenario.pod, ""));
    let output = command.env("SRCIP_EBPF_OBJECT", &path).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let parts =
        ["the kernel refused to load the program srcip_sk_lookup", "verifier log", "R9 !read_ok", "doctor"];
    assert_says(&error, &parts);
    // Nothing half-done stays behind.
    assert!(!scenario.srcip.pin_path().exists());
    assert_eq!(scenario.pod.sh("ip rule").unwrap().matches("fwmark").count(), 0);
}

#[test]
fn json_names_are_stable() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.attach("--name web --include-inbound-ports 8000-8010 --exclude-inbound-ports 8005");
    scenario.assert_kept(Family::V4);
    let status: Value = serde_json::from_str(&scenario.srcip.run("status -o json").unwrap()).unwrap();
    let attachment = &status["attachments"][0];
    let expected = serde_json::json!({
        "name": "web",
        "netns": scenario.pod.path(),
        "netns_cookie": scenario.pod.netns().cookie().unwrap().0,
        "engine": "sk-lookup",
        "proxy_port": 15006,
        "listeners": ["[::]:15006"],
        "registered_listeners": 1,
        "include_inbound_ports": "8000-8010",
        "exclude_inbound_ports": "8005",
        "on_proxy_down": "drop",
        "state": "attached",
        "mark": 1337,
        "route_table": 133,
        "problems": [],
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&attachment[name], value, "{name}");
    }
    for name in ["steered", "passed", "refused"] {
        assert!(attachment["counters"][name].is_u64(), "{name}: {attachment}");
    }
    let yaml = scenario.srcip.run("status -o yaml").unwrap();
    assert_says(&yaml, &["attachments:", "name: web", "proxy_port: 15006"]);
}

#[test]
fn tables_for_people() {
    // Envoy with two workers: four listeners, two addresses.
    let scenario = Scenario::http(Engine::SkLookup, Kind::Envoy);
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert_eq!(status["registered_listeners"], 4, "{status}");
    assert!(scenario.srcip.run("status").unwrap().contains("   0.0.0.0:15006,[::]:15006   0 "));
    drop(scenario);
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.attach("--name web");
    let table = scenario.srcip.run("status").unwrap();
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("NAME   ENGINE      STATE      PROXY   LISTENERS"), "{table}");
    assert!(lines.next().unwrap().starts_with("web    sk-lookup   Attached   15006   [::]:15006"), "{table}");
    assert!(!scenario.srcip.run("status --no-headers").unwrap().contains("NAME"));
    assert_says(
        &scenario.srcip.run("status -o wide").unwrap(),
        &["UPSTREAM-PORTS", "61000-65535,10248-32767"],
    );
    // A reader that has seen enough is no error.
    let mut child =
        scenario.srcip.command("man").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// What the programs themselves say of an attach, with `-v`.
#[test]
fn verbose_shows_the_programs_log() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    for (options, expected) in [("", 0), ("-v", 1)] {
        let arguments = scenario.srcip.attach_arguments(&scenario.pod, options);
        let said = String::from_utf8(scenario.srcip.output(&arguments).unwrap().stderr).unwrap();
        // HAProxy's dual-stack listener: AF_INET6 is 10.
        assert_eq!(said.matches("listener registered: family 10 port 15006").count(), expected, "{said}");
        assert!(said.lines().count() < 10, "{said}");
        scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    }
}

#[test]
fn completions_manual_version() {
    let scenario = Scenario::empty(Engine::SkLookup);
    for shell in ["bash", "zsh", "fish"] {
        let mut command = Command::new(binary("srcip"));
        let script = run(command.args(["completions", shell])).unwrap().stdout;
        assert_says(&String::from_utf8_lossy(&script), &["srcip", "exclude-inbound-ports"]);
    }
    assert_says(&scenario.srcip.run("man").unwrap(), &[".TH srcip 1", "include\\-inbound\\-ports"]);
    assert_eq!(scenario.srcip.run("version").unwrap(), format!("srcip {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn doctor_names_the_cures() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let doctor = |options: &str| {
        let path = scenario.pod.path();
        let output = scenario.srcip.output(&format!("doctor -o json --netns {} {options}", path.display()));
        let output = output.unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code().unwrap(), report)
    };
    let check = |report: &Value, name: &str| {
        let checks = report["checks"].as_array().unwrap();
        let found = checks.iter().find(|check| check["name"].as_str().unwrap().contains(name));
        found.unwrap_or_else(|| panic!("no check {name}: {report}")).clone()
    };
    let (code, report) = doctor("");
    assert_eq!((code, &report["verdict"]), (0, &"ok".into()), "{report}");
    for name in ["kernel BTF", "capabilities", "cgroup v2", "bpffs", "sk_lookup programs", "bpf_sk_assign"] {
        assert_eq!(check(&report, name)["verdict"], "ok", "{report}");
    }
    assert!(check(&report, "auto picks")["found"].as_str().unwrap().starts_with("sk-lookup"));

    // Findings in the pod: rules on the mark, routes in the table, interception, lo down.
    scenario.pod.ip("rule add fwmark 1337 lookup 100").unwrap();
    scenario.pod.ip("route add 192.0.2.0/24 dev eth0 table 133").unwrap();
    scenario
        .pod
        .feed("iptables-restore", "*nat\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT\n")
        .unwrap();
    let (code, report) = doctor("");
    assert_eq!((code, &report["verdict"]), (1, &"limited".into()), "{report}");
    for (name, found, cure) in [
        ("mark 1337", "fwmark 0x539", "--mark"),
        ("routing table 133", "1 routes", "--route-table"),
        ("interception", "REDIRECT --to-ports 15006", "remove them"),
    ] {
        let check = check(&report, name);
        assert_eq!(check["verdict"], "limited");
        assert_says(check["found"].as_str().unwrap(), &[found]);
        assert_says(check["cure"].as_str().unwrap(), &[cure]);
    }
    let (_, report) = doctor("--mark 7 --route-table 7");
    assert_eq!(check(&report, "mark 7")["verdict"], "ok");
    scenario.pod.ip("link set lo down").unwrap();
    let (code, report) = doctor("");
    assert_eq!(code, 2, "{report}");
    assert_says(check(&report, "loopback")["cure"].as_str().unwrap(), &["ip link set lo up"]);
    let output = scenario.srcip.output("doctor").unwrap();
    assert_says(&String::from_utf8_lossy(&output.stdout), &["RESULT", "CHECK", "FOUND", "CURE"]);
}

/// What people get wrong with the verbs that look on: what it was, and what helps.
#[test]
fn mistakes_in_looking_on() {
    let world = World::new().unwrap();
    let srcip = world.srcip();
    let directory = world.directory().join("manifests");
    let directory = directory.display();
    std::fs::create_dir(world.directory().join("manifests")).unwrap();
    std::fs::write(world.directory().join("manifests/pod.yaml"), "kind: Pod\nmetadata: 3\n").unwrap();
    for (arguments, says) in [
        ("observe -f --cgroup /tmp", "/tmp: it is not a directory of cgroup v2"),
        ("observe --from 10.0.0.300", "expected 10.0.0.1, 10.0.0.0/8 or fd00::/8"),
        ("observe --since soon", "such as 30s or 5m"),
        ("top", "srcip observe -f"),
        ("audit --netns /run/netns/srcip-no-such-name", "srcip-no-such-name: no such file"),
        ("audit --manifests /no/such/directory", "/no/such/directory"),
        (&format!("audit --manifests {directory}"), "pod.yaml: the Pod \"without a name\""),
        ("audit --service web", "expected NAMESPACE/NAME"),
        ("audit --service web/httpbin:local", "expected Cluster or Local"),
        ("explain --from here", "expected 10.0.0.1, 10.0.0.1:8000"),
        ("explain", "--from"),
        ("export --metrics-address none", "nothing to export"),
    ] {
        let error = srcip.fail(arguments).unwrap();
        assert!(error.contains(says), "srcip {arguments}: {error}");
    }
    assert!(!srcip.pin_path().exists(), "looking on leaves nothing behind");
}
