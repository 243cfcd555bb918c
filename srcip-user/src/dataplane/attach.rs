//! Attach: every step finds out whether it is done already, so that one that was interrupted is
//! finished by running it again.

use std::path::{Path, PathBuf};

use srcip_common::pod::HAS_COMPANION;

use super::{
    Dataplane, engine,
    error::{Error, Result},
    hooks, in_netns,
    maps::{Maps, record_pod},
    object::{Objects, Replaced},
    pins::{make_directory, remove_tree},
    record::{AttachSpec, EngineKind, Record, State, TcHook},
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
    /// Programs of another build that this build's took the place of.
    pub replaced: Vec<Replaced>,
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
        let mut objects = self.objects();
        let attached = self.attach_locked(&mut objects, &spec, cookie, cgroup, engine, reason, name);
        drop(objects);
        if attached.is_err() {
            self.remove_if_unused();
        }
        attached
    }

    #[expect(clippy::too_many_arguments, reason = "what attach has found out before it took the lock")]
    fn attach_locked(
        &self,
        objects: &mut Objects,
        spec: &AttachSpec,
        cookie: NetnsCookie,
        cgroup: Option<PathBuf>,
        engine: EngineKind,
        engine_reason: String,
        name: String,
    ) -> Result<Attached> {
        objects.check_maps(&self.pins)?;
        objects.ensure_maps(&self.pins)?;
        Maps::stamp_layout(&self.pins)?;
        let mut maps = Maps::open(&self.pins)?;
        self.check_conflicts(&mut maps, &name, cookie, cgroup.as_deref())?;

        let previous = maps.record(cookie)?;
        let was_attached = previous.as_ref().is_some_and(|record| record.state == State::Attached);
        let sysctls = spec.netns.run(Sysctls::read)?.map_err(|e| in_netns(e, &spec.netns))?;
        let settings = &spec.settings;
        let mut record = Record {
            name,
            netns: spec.netns.path().to_owned(),
            netns_cookie: cookie,
            netns_inode: Some(spec.netns.id().inode()),
            pod: spec.pod.clone().or_else(|| previous.as_ref().and_then(|previous| previous.pod.clone())),
            state: if was_attached { State::Attached } else { State::Attaching },
            engine,
            engine_reason,
            engine_wanted: spec.engine,
            proxy_port: settings.proxy_port,
            include_inbound_ports: settings.include.to_string(),
            exclude_inbound_ports: settings.exclude.to_string(),
            on_proxy_down: settings.on_proxy_down,
            mark: settings.route.mark,
            route_table: settings.route.table,
            upstream_ports: settings.upstream_ports.to_string(),
            upstream_port_at: settings.upstream_port_at,
            cgroup_id: cgroup.as_deref().and_then(hooks::cgroup_id),
            cgroup,
            previous_sysctls: sysctls,
            tc_hook: None,
            tc_devices: Vec::new(),
            earlier_routes: Vec::new(),
        };
        if let Some(previous) = &previous {
            // Ours are in place already; the values to restore are those from before.
            record.previous_sysctls.clone_from(&previous.previous_sysctls);
            // What is in place stays remembered until it is taken away.
            record.tc_devices.clone_from(&previous.tc_devices);
            record.earlier_routes = previous.routes().filter(|route| *route != settings.route).collect();
        }
        if engine == EngineKind::Tc {
            tc::plan(&spec.netns, spec.tc_hook.unwrap_or_else(TcHook::newest), &mut record)?;
        }

        let mut warnings = Vec::new();
        let done = self.carry_out(&mut maps, objects, spec, previous.as_ref(), &mut record, &mut warnings);
        if let Err(error) = done {
            // The first error is the one to report; `cleanup` finishes what this cannot.
            let second = match previous {
                None => self.take_away(&mut maps, &record, Some(&spec.netns)),
                // It stays as it was, and knows what there may be besides.
                Some(mut previous) => {
                    let current = previous.route();
                    previous.earlier_routes = record.routes().filter(|route| *route != current).collect();
                    previous.tc_devices.clone_from(&record.tc_devices);
                    maps.store_record(&previous)
                }
            };
            if let Err(second) = second {
                tracing::warn!("taking the half-done attachment back failed: {second}");
            }
            return Err(error);
        }
        match look_around(spec, &record) {
            Ok(found) => warnings.extend(found),
            Err(error) => warnings.push(format!("the pod could not be looked at: {error}")),
        }
        Ok(Attached { record, was_attached, replaced: objects.take_replaced(), warnings })
    }

    fn carry_out(
        &self,
        maps: &mut Maps,
        objects: &mut Objects,
        spec: &AttachSpec,
        previous: Option<&Record>,
        record: &mut Record,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let cookie = record.netns_cookie;
        let netns = &spec.netns;
        maps.store_record(record)?;
        if let Some(cgroup) = &record.cgroup
            && let Err(error) = hooks::ensure(objects, &self.pins, cgroup)
        {
            if record.engine != EngineKind::Tc {
                return Err(error);
            }
            // This engine can do without, with fewer guarantees.
            warnings.push(format!("the hooks cannot be attached: {error}"));
            record.cgroup = None;
        }
        if let Some(cgroup) = &record.cgroup {
            // Steering does not need it: a kernel that refuses it is no reason to do without.
            let recorded = hooks::ensure_recorder(objects, &self.pins, cgroup)
                .and_then(|()| record_pod(&self.pins, cookie, Some(record.mark)));
            if let Err(error) = recorded {
                warnings.push(format!("connections are not recorded for `srcip observe --last`: {error}"));
            }
        }
        let route = record.route();
        let addresses = netns
            .run(|| {
                route.install()?;
                Sysctls::needed(&record.previous_sysctls, route.has_twin()?).write()?;
                routing::addresses()
            })?
            .map_err(|e| in_netns(e, netns))?;
        maps.store_addresses(cookie, &addresses)?;
        let engine = record.engine.engine();
        let mut programs = objects.pod(&self.pins, cookie);
        if previous.is_some_and(|previous| previous.proxy_port != record.proxy_port) {
            engine.prepare(&mut programs, netns, record)?;
        }
        let mut pod = spec.settings.pod();
        if record.engine == EngineKind::Tc && tc::has_companion() {
            pod.flags |= HAS_COMPANION;
        }
        maps.store_pod(cookie, pod)?;
        // From here on connections are steered.
        engine.attach(&mut programs, netns, record, &mut |record| maps.store_record(record))?;
        for other in EngineKind::ALL.into_iter().filter(|kind| *kind != record.engine) {
            other.engine().detach(&self.pins, Some(netns), record)?;
        }
        if record.engine != EngineKind::Tc {
            record.tc_devices.clear();
        }
        record.state = State::Attached;
        maps.store_record(record)
    }

    fn check_conflicts(
        &self,
        maps: &mut Maps,
        name: &str,
        cookie: NetnsCookie,
        cgroup: Option<&Path>,
    ) -> Result<()> {
        let mut replaced = false;
        for other in self.records_locked()? {
            if other.name == name && other.netns_cookie != cookie {
                // Not looked for: between the plugin and its first process, a pod can be found nowhere.
                if !self.is_gone(&other)? {
                    return Err(Error::NameTaken { name: other.name, netns: other.netns });
                }
                // A pod of before, whose namespace has gone: this one has come in its place.
                self.take_away(maps, &other, None)?;
                continue;
            }
            let (Some(attached), Some(wanted)) = (other.cgroup, cgroup) else { continue };
            if attached != wanted {
                return Err(Error::OtherCgroup { attached, wanted: wanted.to_owned() });
            }
            replaced |= other.cgroup_id != hooks::cgroup_id(wanted);
        }
        if replaced && let Some(cgroup) = cgroup {
            // The cgroup was removed, and its hooks with it; this is a new one by the same name. It serves
            // all pods, so all are told.
            remove_tree(&self.pins.node())?;
            make_directory(&self.pins.node())?;
            for mut record in self.records_locked()?.into_iter().filter(|record| record.cgroup.is_some()) {
                record.cgroup_id = hooks::cgroup_id(cgroup);
                maps.store_record(&record)?;
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

/// What the user should know about the pod's other rules, routes and ports.
fn look_around(spec: &AttachSpec, record: &Record) -> Result<Vec<String>> {
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
