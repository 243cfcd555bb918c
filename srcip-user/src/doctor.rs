//! What a node, and a pod on it, can run: every check tries the thing itself, and names the cure.

use aya::Btf;
use nix::sys::{
    statfs::{BPF_FS_MAGIC, statfs},
    utsname::uname,
};
use serde::Serialize;

use crate::{
    audit::netfilter::{Interception, Mode},
    dataplane::{
        engine::{self, Requirement, sk_lookup_requirements, tc_requirements},
        hooks::cgroup_root,
        record::TcHook,
    },
    netns::Netns,
    northsouth::dataplane,
    ports::{DEFAULT_UPSTREAM_PORTS, UpstreamPortList},
    privileges,
    routing::{self, ForeignRule, ReturnRoute, RoutingError},
    sysctl::{self, Sysctls},
};

/// How a check came out; the worst one is the report's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// srcip works, but not all of it.
    Limited,
    /// srcip cannot work.
    Unable,
}

/// One thing looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cure: Option<String>,
}

/// What to look at.
#[derive(Debug)]
pub struct Options {
    /// A pod's network namespace.
    pub netns: Option<Netns>,
    /// The mark that would be used.
    pub mark: u32,
    /// The table that would be used.
    pub route_table: u32,
}

/// All checks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Report {
    /// The worst of them.
    pub verdict: Verdict,
    /// The checks.
    pub checks: Vec<Check>,
    /// In one sentence.
    pub summary: String,
}

fn ok(name: &str, found: impl Into<String>) -> Check {
    Check { name: name.to_owned(), verdict: Verdict::Ok, found: found.into(), cure: None }
}

fn bad(name: &str, verdict: Verdict, found: impl Into<String>, cure: impl Into<String>) -> Check {
    Check { name: name.to_owned(), verdict, found: found.into(), cure: Some(cure.into()) }
}

impl Report {
    /// Makes all checks.
    pub fn make(options: &Options) -> Self {
        let mut checks = vec![kernel_version()];
        let capabilities = capabilities();
        let may_probe = capabilities.verdict == Verdict::Ok;
        checks.push(capabilities);
        checks.push(btf());
        let cgroup = cgroup_v2();
        let hooks = cgroup.verdict == Verdict::Ok;
        checks.push(cgroup);
        checks.push(bpffs());
        checks.push(sysctls());
        if may_probe {
            checks.extend(engines(hooks));
            checks.extend(north_south());
        } else {
            checks.push(bad(
                "engines",
                Verdict::Unable,
                "not tried: that takes the capabilities above",
                "run `srcip doctor` as root",
            ));
        }
        if let Some(netns) = &options.netns {
            checks.extend(pod(netns, options));
        }
        let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok);
        let summary = match verdict {
            Verdict::Ok => "everything srcip needs is here".to_owned(),
            Verdict::Limited => "srcip works here, with the limits named above".to_owned(),
            Verdict::Unable => "srcip cannot work here until the above is cured".to_owned(),
        };
        Self { verdict, checks, summary }
    }
}

fn kernel_version() -> Check {
    let release = uname().map_or_else(
        |error| format!("unknown ({error})"),
        |name| name.release().to_string_lossy().into_owned(),
    );
    // For information: what counts is tried below.
    ok("kernel", release)
}

fn capabilities() -> Check {
    let missing = privileges::missing();
    if missing.is_empty() {
        return ok("capabilities", "all there");
    }
    let names: Vec<_> = missing.iter().map(|(name, why)| format!("{name} ({why})")).collect();
    bad(
        "capabilities",
        Verdict::Unable,
        format!("missing {}", names.join(", ")),
        "run as root, or give the container these capabilities",
    )
}

fn btf() -> Check {
    match Btf::from_sys_fs() {
        Ok(_) => ok("kernel BTF", "/sys/kernel/btf/vmlinux"),
        Err(error) => bad(
            "kernel BTF",
            Verdict::Limited,
            format!("cannot be read: {error}"),
            "run a kernel built with CONFIG_DEBUG_INFO_BTF; without it only --engine tc works",
        ),
    }
}

fn cgroup_v2() -> Check {
    match cgroup_root() {
        Some(path) => ok("cgroup v2", path.display().to_string()),
        None => bad(
            "cgroup v2",
            Verdict::Limited,
            "not mounted: no hooks, so no sk-lookup, no mark and no source port for the proxy",
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or use --engine tc --cgroup none",
        ),
    }
}

fn bpffs() -> Check {
    const PATH: &str = "/sys/fs/bpf";
    match statfs(PATH) {
        Ok(fs) if fs.filesystem_type() == BPF_FS_MAGIC => ok("bpffs", PATH),
        // Not a limit: attach mounts it.
        Ok(_) => ok("bpffs", "not mounted; attach mounts it at /sys/fs/bpf"),
        Err(error) => bad(
            "bpffs",
            Verdict::Unable,
            format!("{PATH}: {}", error.desc()),
            "mount sysfs and, on it, a BPF file system: mount -t bpf bpf /sys/fs/bpf",
        ),
    }
}

fn sysctls() -> Check {
    const NAME: &str = "sysctls for the return route";
    match Sysctls::read() {
        Ok(_) => ok(NAME, "there"),
        Err(error) => bad(NAME, Verdict::Unable, error.to_string(), "run Linux 3.15 or newer"),
    }
}

fn requirement(of: &str, Requirement { name, since, available }: Requirement) -> Check {
    let name = format!("{of}: {name}");
    if available {
        ok(&name, "there")
    } else {
        bad(&name, Verdict::Limited, "missing", format!("run Linux {since} or newer"))
    }
}

/// For agents with `--uplink` alone.
fn north_south() -> Vec<Check> {
    const NAME: &str = "north-south";
    let mut checks: Vec<_> = dataplane::requirements().into_iter().map(|r| requirement(NAME, r)).collect();
    let attached_by = match TcHook::newest() {
        TcHook::Tcx => "tcx links",
        TcHook::Clsact => "filters of clsact: tcx takes Linux 6.6",
    };
    checks.push(ok("north-south: attached by", attached_by));
    checks
}

fn engines(hooks: bool) -> Vec<Check> {
    let mut checks: Vec<_> =
        sk_lookup_requirements().into_iter().map(|r| requirement("sk-lookup", r)).collect();
    checks.extend(tc_requirements().into_iter().map(|r| requirement("tc", r)));
    checks.push(match engine::choose(None, hooks) {
        Ok((engine, reason)) => {
            let found = format!("{engine}: {reason}");
            if hooks {
                ok("engine that auto picks", found)
            } else {
                bad(
                    "engine that auto picks",
                    Verdict::Limited,
                    format!(
                        "{found}; not guaranteed then: upstream connections are not marked, upstream \
                         source ports are not chosen, a missing proxy drops instead of refuses"
                    ),
                    "make cgroup v2 available",
                )
            }
        }
        Err(error) => bad(
            "engine that auto picks",
            Verdict::Unable,
            error.to_string(),
            "run a kernel that has what is missing above",
        ),
    });
    checks
}

fn pod(netns: &Netns, options: &Options) -> Vec<Check> {
    let route = ReturnRoute { mark: options.mark, table: options.route_table };
    let looked =
        netns.run(|| vec![foreign_rules(route), foreign_routes(route), loopback(), ephemeral_ports()]);
    let mut checks =
        looked.unwrap_or_else(|error| vec![bad("pod", Verdict::Unable, error.to_string(), "run as root")]);
    checks.push(interception(netns));
    if netns.is_host() {
        checks.push(bad(
            "network namespace",
            Verdict::Limited,
            "the host's own: steering it would take every connection to this machine",
            "give a pod's",
        ));
    }
    checks
}

fn unreadable(name: &str, error: &RoutingError) -> Check {
    bad(name, Verdict::Limited, error.to_string(), "run as root")
}

fn foreign_rules(route: ReturnRoute) -> Check {
    let name = format!("pod: mark {}", route.mark);
    match route.foreign_rules() {
        Ok(rules) if rules.is_empty() => ok(&name, "free"),
        Ok(rules) => {
            let rules: Vec<_> = rules.into_iter().map(|ForeignRule { description }| description).collect();
            bad(
                &name,
                Verdict::Limited,
                format!("used by another component: {}", rules.join("; ")),
                "attach with another --mark, or remove those rules (`ip rule del`)",
            )
        }
        Err(error) => unreadable(&name, &error),
    }
}

fn foreign_routes(route: ReturnRoute) -> Check {
    let name = format!("pod: routing table {}", route.table);
    match route.foreign_routes() {
        Ok(0) => ok(&name, "free"),
        Ok(count) => bad(
            &name,
            Verdict::Limited,
            format!("holds {count} routes of another component"),
            "attach with another --route-table",
        ),
        Err(error) => unreadable(&name, &error),
    }
}

fn loopback() -> Check {
    match routing::loopback_is_up() {
        Ok(true) => ok("pod: loopback", "up"),
        Ok(false) => bad(
            "pod: loopback",
            Verdict::Unable,
            "lo is down: the proxy cannot reach the application",
            "ip link set lo up",
        ),
        Err(error) => unreadable("pod: loopback", &error),
    }
}

fn ephemeral_ports() -> Check {
    const NAME: &str = "pod: ephemeral ports";
    match sysctl::ephemeral_ports() {
        Ok((first, last)) => {
            let ports: UpstreamPortList =
                DEFAULT_UPSTREAM_PORTS.parse().expect("a constant that a test parses");
            if (first..=last).any(|port| ports.ports.contains(port)) {
                bad(
                    NAME,
                    Verdict::Limited,
                    format!("{first}-{last} overlap the default upstream ports {ports}"),
                    "attach with --upstream-ports outside of the range that your clients use",
                )
            } else {
                ok(NAME, format!("{first}-{last}"))
            }
        }
        Err(error) => unreadable(NAME, &error),
    }
}

/// Rules in the pod that take connections before any listener is looked for.
fn interception(netns: &Netns) -> Check {
    const NAME: &str = "pod: interception by rules";
    let found = Interception::read(netns);
    if let Some(why) = found.unreadable {
        return bad(NAME, Verdict::Limited, why, "look with `nft list ruleset` in the pod");
    }
    match found.mode {
        None => ok(NAME, "none"),
        // Both keep the address; srcip sees to the source ports.
        Some(Mode::Tproxy) => ok(NAME, "by TPROXY, beside which srcip works"),
        Some(Mode::Redirect) => bad(
            NAME,
            Verdict::Limited,
            format!("these take connections first, and the client's address: {}", found.rules.join("; ")),
            "remove them (`srcip audit` has the commands); with Istio, annotate the pod with \
             sidecar.istio.io/interceptionMode: TPROXY",
        ),
    }
}
