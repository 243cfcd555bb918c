//! Attach: every step finds out whether it is done already, so that one that was interrupted is
//! finished by running it again.

use srcip_common::pod::REOPEN_BY_LOOKUP;

use super::{
    Dataplane, engine,
    error::{Error, Result},
    hooks, in_netns,
    maps::Maps,
    object,
    record::{AttachSpec, EngineKind, Record, State},
    tc,
};
use crate::{
    netns::NetnsCookie,
    routing::{self, ForeignRule},
    sysctl::{self, Sysctls},
};

/// What an attach did.
#[derive(Debug)]
pub struct Attached {
    /// The attachment as it is now.
    pub record: Record,
    /// Whether it was there before.
    pub was_attached: bool,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl Dataplane {
    /// Steers a pod, or changes the settings of one that is steered.
    ///
    /// If it fails half-way, a new attachment is taken back; one that was there stays.
    pub fn attach(&self, spec: AttachSpec) -> Result<Attached> {
        if spec.netns.is_host() && !spec.host_netns {
            return Err(Error::HostNetns(spec.netns.path().to_owned()));
        }
        let cookie = spec.netns.cookie()?;
        let cgroup = hooks::resolve_cgroup(&spec.cgroup)?;
        let (engine, reason) = engine::choose(spec.engine, cgroup.is_some())?;
        let name = spec.name.clone().unwrap_or_else(|| default_name(&spec, cookie));

        let _lock = self.pins.create()?;
        Maps::check_layout(&self.pins)?;
        let mut node = match object::load(&self.pins, None) {
            Ok(node) => node,
            Err(error) => {
                self.remove_if_unused();
                return Err(error);
            }
        };
        Maps::stamp_layout(&self.pins)?;
        let mut maps = Maps::open(&self.pins)?;

        let previous = maps.record(cookie)?;
        let checked = self.check_conflicts(&maps, &name, cookie, cgroup.as_deref());
        if let Err(error) = checked {
            self.remove_if_unused();
            return Err(error);
        }
        let was_attached = previous.as_ref().is_some_and(|record| record.state == State::Attached);
        let sysctls = spec.netns.run(Sysctls::read)?;
        let settings = &spec.settings;
        let mut record = Record {
            name,
            netns: spec.netns.path().to_owned(),
            netns_cookie: cookie,
            state: if was_attached { State::Attached } else { State::Attaching },
            engine,
            engine_reason: reason,
            proxy_port: settings.proxy_port,
            include_inbound_ports: settings.include.to_string(),
            exclude_inbound_ports: settings.exclude.to_string(),
            on_proxy_down: settings.on_proxy_down,
            mark: settings.route.mark,
            route_table: settings.route.table,
            upstream_ports: settings.upstream_ports.to_string(),
            upstream_port_at: settings.upstream_port_at,
            cgroup,
            previous_sysctls: match &previous {
                // Ours are in place already; the values to restore are those from before.
                Some(previous) => previous.previous_sysctls.clone(),
                None => sysctls.map_err(|e| in_netns(e, &spec.netns))?,
            },
            tc_devices: Vec::new(),
        };
        if engine == EngineKind::Tc {
            if let Some(previous) = &previous {
                record.tc_devices.clone_from(&previous.tc_devices);
            }
            let hook = spec.tc_hook.unwrap_or_else(tc::default_hook);
            tc::plan(&spec.netns, hook, &mut record)?;
        }

        let done = self.carry_out(&mut maps, &mut node, &spec, previous.as_ref(), &mut record);
        if let Err(error) = done {
            if previous.is_none() {
                // The first error is the one to report; `cleanup` finishes what this cannot.
                if let Err(second) = self.tear_down(&mut maps, &record, Some(&spec.netns)) {
                    tracing::warn!("taking the half-done attachment back failed: {second}");
                }
            }
            return Err(error);
        }
        let warnings = warnings(&spec, &record)?;
        Ok(Attached { record, was_attached, warnings })
    }

    fn carry_out(
        &self,
        maps: &mut Maps,
        node: &mut aya::Ebpf,
        spec: &AttachSpec,
        previous: Option<&Record>,
        record: &mut Record,
    ) -> Result<()> {
        let cookie = record.netns_cookie;
        let netns = &spec.netns;
        maps.store_record(record)?;
        if let Some(cgroup) = &record.cgroup {
            hooks::ensure(&self.pins, node, cgroup)?;
        }
        let route = record.route();
        let addresses = netns
            .run(|| {
                route.install()?;
                Sysctls::needed()?.write()?;
                routing::addresses()
            })?
            .map_err(|e| in_netns(e, netns))?;
        maps.store_addresses(cookie, &addresses)?;
        let mut pod = spec.settings.pod();
        if record.engine == EngineKind::Tc && tc::has_companion() {
            pod.flags |= REOPEN_BY_LOOKUP;
        }
        maps.store_pod(cookie, pod)?;
        // Last: from here on connections are steered.
        let engine = record.engine.engine();
        engine.attach(&self.pins, netns, record, &mut |record| maps.store_record(record))?;
        if let Some(previous) = previous {
            if previous.engine != record.engine {
                previous.engine.engine().detach(&self.pins, Some(netns), previous)?;
            }
            if previous.route() != record.route() {
                netns.run(|| previous.route().remove())?.map_err(|e| in_netns(e, netns))?;
            }
        }
        record.state = State::Attached;
        maps.store_record(record)
    }

    fn check_conflicts(
        &self,
        maps: &Maps,
        name: &str,
        cookie: NetnsCookie,
        cgroup: Option<&std::path::Path>,
    ) -> Result<()> {
        for other in maps.records()? {
            if other.name == name && other.netns_cookie != cookie {
                return Err(Error::NameTaken { name: other.name, netns: other.netns });
            }
            if let (Some(attached), Some(wanted)) = (other.cgroup, cgroup)
                && attached != wanted
            {
                return Err(Error::OtherCgroup { attached, wanted: wanted.to_owned() });
            }
        }
        Ok(())
    }
}

/// `/run/netns/NAME` -> `NAME`, `/proc/PID/ns/net` -> `pid-PID`.
fn default_name(spec: &AttachSpec, cookie: NetnsCookie) -> String {
    let parts: Vec<_> = spec.netns.path().iter().map(|part| part.to_string_lossy().into_owned()).collect();
    match &parts[..] {
        [_, proc, pid, ns, net] if proc == "proc" && ns == "ns" && net == "net" => {
            format!("pid-{pid}")
        }
        [.., last] => last.clone(),
        [] => format!("netns-{cookie}"),
    }
}

fn warnings(spec: &AttachSpec, record: &Record) -> Result<Vec<String>> {
    let (foreign, routes, ephemeral) = spec
        .netns
        .run(|| {
            let route = record.route();
            Ok((route.foreign_rules()?, route.foreign_routes()?, sysctl::ephemeral_ports()?))
        })?
        .map_err(|e| in_netns(e, &spec.netns))?;
    let mut warnings: Vec<String> = foreign
        .into_iter()
        .map(|ForeignRule { description }| {
            format!(
                "another component's {description} takes packets with our mark {}; choose another \
                 --mark, or remove that rule",
                record.mark
            )
        })
        .collect();
    if routes > 0 {
        warnings.push(format!(
            "table {} holds {routes} routes of another component; choose another --route-table",
            record.route_table
        ));
    }
    let (first, last) = ephemeral;
    let ports = &spec.settings.upstream_ports;
    if (first..=last).any(|port| ports.ports.contains(port)) {
        warnings.push(format!(
            "the upstream ports {ports} overlap the ephemeral range {first}-{last} \
             (net.ipv4.ip_local_port_range): clients use those ports too, and one that meets its own \
             mirrored tuple hangs; choose --upstream-ports outside of it"
        ));
    }
    Ok(warnings)
}
