//! The return route: brings the application's answers, addressed to the client, back to the proxy.
//!
//! In the pod's network namespace, per family: one rule that sends marked packets to a table, and one
//! `local default dev lo` route in that table; and a few sysctls, see
//! [`crate::sysctl`].
//!
//! Everything here acts on the calling thread's network namespace.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::{
    address::AddressAttribute,
    link::{LinkAttribute, LinkFlags, LinkLayerType},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

/// Marks rules and routes as ours (`ip rule` shows `proto 213`), so that nothing else is ever removed.
/// Not taken in `/etc/iproute2/rt_protos`.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(213);

/// Before the table `main` (32766), after anything an administrator is likely to have put in front.
const RULE_PRIORITY: u32 = 1337;

/// The metric of our routes. Istio adds the same route to the same table, with the kernel's default metric, and
/// takes "exists already" for success: with a metric of its own, ours is neither in the way of that one nor
/// missed by Istio's rules once it goes.
const ROUTE_METRIC: u32 = 213;

/// `LOOPBACK_IFINDEX`: the same in every network namespace.
const LOOPBACK: u32 = 1;

const FAMILIES: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// Why the return route could not be set up, removed or read.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action}: {source}{hint}")]
pub struct RoutingError {
    pub(crate) action: String,
    pub(crate) source: io::Error,
    pub(crate) hint: &'static str,
}

pub(crate) type Result<T> = std::result::Result<T, RoutingError>;

/// What a return route is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct ReturnRoute {
    /// Routing mark of the upstream legs; matched with the full mask.
    pub mark: u32,
    /// Number of the table with the local route.
    pub table: u32,
}

/// A rule of somebody else's that matches our mark.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ForeignRule {
    /// As `ip rule` shows it.
    pub description: String,
}

/// A device packets can come in by.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Device {
    /// Its number in this network namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
}

impl ReturnRoute {
    /// Adds rules and routes; those already there are left as they are.
    pub fn install(&self) -> Result<()> {
        netlink(async |handle| {
            for family in FAMILIES {
                if let Err(error) = self.install_family(&handle, &family).await {
                    // A kernel booted without IPv6 has nothing to return there.
                    if family == IpVersion::V6 && !Path::new("/proc/net/if_inet6").exists() {
                        continue;
                    }
                    return Err(error);
                }
            }
            Ok(())
        })
    }

    async fn install_family(&self, handle: &Handle, family: &IpVersion) -> Result<()> {
        let hint = "; is lo up? (`ip link set lo up`)";
        let mut message = self.route(family);
        message.attributes.push(RouteAttribute::Priority(ROUTE_METRIC));
        let added = handle.route().add(message).execute().await;
        tolerate(added, libc::EEXIST).map_err(|source| RoutingError {
            action: format!("add the local route to table {}", self.table),
            source,
            hint,
        })?;
        if rules(handle, family).await?.iter().any(|rule| self.is_our_rule(rule)) {
            return Ok(());
        }
        let mut request = handle
            .rule()
            .add()
            .table_id(self.table)
            .priority(RULE_PRIORITY)
            .fw_mark(self.mark)
            .action(RuleAction::ToTable);
        let message = request.message_mut();
        message.attributes.push(RuleAttribute::FwMask(u32::MAX));
        message.attributes.push(RuleAttribute::Protocol(PROTOCOL));
        let added = match family {
            IpVersion::V4 => request.v4().execute().await,
            IpVersion::V6 => request.v6().execute().await,
        };
        tolerate(added, libc::EEXIST).map_err(|source| RoutingError {
            action: format!("add the rule for mark {:#x}", self.mark),
            source,
            hint: "",
        })
    }

    /// Removes what [`Self::install`] added, and nothing that somebody else did.
    pub fn remove(&self) -> Result<()> {
        netlink(async |handle| {
            for family in FAMILIES {
                for rule in rules(&handle, &family).await? {
                    if self.is_our_rule(&rule) {
                        let removed = handle.rule().del(rule).execute().await;
                        tolerate(removed, libc::ENOENT).map_err(|source| RoutingError {
                            action: format!("remove the rule for mark {:#x}", self.mark),
                            source,
                            hint: "",
                        })?;
                    }
                }
                // Without a metric: whatever it is, the kernel compares the protocol.
                let removed = handle.route().del(self.route(&family)).execute().await;
                // No such route, or no such table, or no such family.
                let removed = tolerate(removed, libc::ESRCH)
                    .or_else(|e| tolerate_io(e, libc::ENOENT))
                    .or_else(|e| tolerate_io(e, libc::EAFNOSUPPORT))
                    .or_else(|e| tolerate_io(e, libc::EOPNOTSUPP));
                removed.map_err(|source| RoutingError {
                    action: format!("remove the local route from table {}", self.table),
                    source,
                    hint: "",
                })?;
            }
            Ok(())
        })
    }

    /// Rules of others that look at our mark and lead elsewhere. Packets that bear it would go where those say.
    pub fn foreign_rules(&self) -> Result<Vec<ForeignRule>> {
        netlink(async |handle| {
            let mut foreign = Vec::new();
            for family in FAMILIES {
                let found = rules(&handle, &family).await?;
                foreign.extend(
                    found
                        .iter()
                        .filter(|rule| !is_ours(rule) && matches_mark(rule, self.mark))
                        // As Istio's: it says the same as ours.
                        .filter(|rule| !rule.attributes.contains(&RuleAttribute::Table(self.table)))
                        .map(|rule| ForeignRule { description: describe(rule, &family) }),
                );
            }
            Ok(foreign)
        })
    }

    /// Whether somebody else has a rule that sends our mark to our table, as Istio does for TPROXY.
    pub fn has_twin(&self) -> Result<bool> {
        netlink(async |handle| {
            let found = rules(&handle, &IpVersion::V4).await?;
            Ok(found.iter().any(|rule| {
                !is_ours(rule)
                    && matches_mark(rule, self.mark)
                    && rule.attributes.contains(&RuleAttribute::Table(self.table))
            }))
        })
    }

    /// How many routes of others lie in our table and lead elsewhere.
    pub fn foreign_routes(&self) -> Result<usize> {
        netlink(async |handle| {
            let is_foreign = |route: &&RouteMessage| {
                table_of(route) == self.table && route.header.protocol != PROTOCOL && !is_return_route(route)
            };
            Ok(routes(&handle).await?.iter().filter(is_foreign).count())
        })
    }

    fn is_our_rule(&self, rule: &RuleMessage) -> bool {
        is_ours(rule)
            && rule.attributes.contains(&RuleAttribute::FwMark(self.mark))
            && rule.attributes.contains(&RuleAttribute::Table(self.table))
    }

    fn route(&self, family: &IpVersion) -> RouteMessage {
        match family {
            IpVersion::V4 => self.finish(RouteMessageBuilder::<Ipv4Addr>::new()),
            IpVersion::V6 => self.finish(RouteMessageBuilder::<Ipv6Addr>::new()),
        }
    }

    fn finish<T>(&self, builder: RouteMessageBuilder<T>) -> RouteMessage {
        builder
            .output_interface(LOOPBACK)
            .table_id(self.table)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .protocol(PROTOCOL)
            .build()
    }
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(PROTOCOL))
}

fn matches_mark(rule: &RuleMessage, mark: u32) -> bool {
    let mut wanted = None;
    let mut mask = u32::MAX;
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::FwMark(value) => wanted = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            _ => {}
        }
    }
    wanted.is_some_and(|wanted| mark & mask == wanted & mask)
}

fn describe(rule: &RuleMessage, family: &IpVersion) -> String {
    let mut text = String::from(match family {
        IpVersion::V4 => "IPv4 rule:",
        IpVersion::V6 => "IPv6 rule:",
    });
    for attribute in &rule.attributes {
        text += &match attribute {
            RuleAttribute::Priority(value) => format!(" priority {value}"),
            RuleAttribute::FwMark(value) => format!(" fwmark {value:#x}"),
            RuleAttribute::FwMask(value) if *value != u32::MAX => format!("/{value:#x}"),
            RuleAttribute::Table(value) => format!(" lookup {value}"),
            _ => continue,
        };
    }
    text
}

/// Whether it is `local default dev lo`, as ours and Istio's.
fn is_return_route(route: &RouteMessage) -> bool {
    route.header.kind == RouteType::Local
        && route.header.destination_prefix_length == 0
        && route.attributes.contains(&RouteAttribute::Oif(LOOPBACK))
}

fn table_of(route: &RouteMessage) -> u32 {
    let wide = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| route.header.table.into())
}

async fn rules(handle: &Handle, family: &IpVersion) -> Result<Vec<RuleMessage>> {
    let rules = handle.rule().get(family.clone()).execute().try_collect().await;
    match rules {
        // A kernel without policy routing for that family, or without the family.
        Err(error) if [libc::EAFNOSUPPORT, libc::EOPNOTSUPP].contains(&errno(&error)) => Ok(Vec::new()),
        rules => failing("read the routing rules", rules),
    }
}

/// All addresses of the namespace but loopback's.
pub fn addresses() -> Result<Vec<IpAddr>> {
    addresses_if(|_| true)
}

/// The addresses of a device.
pub fn addresses_of(device: &Device) -> Result<Vec<IpAddr>> {
    addresses_if(|index| index == device.index)
}

fn addresses_if(is_wanted: impl Fn(u32) -> bool) -> Result<Vec<IpAddr>> {
    netlink(async |handle| {
        let messages = handle.address().get().execute().try_collect::<Vec<_>>().await;
        let messages = failing("read the addresses", messages)?;
        let mut addresses: Vec<_> = messages
            .iter()
            .filter(|message| is_wanted(message.header.index))
            .filter_map(|message| {
                // On a point-to-point device `Address` is the other end's; `Local` is ours.
                let local = message.attributes.iter().find_map(|a| match a {
                    AddressAttribute::Local(ip) => Some(*ip),
                    _ => None,
                });
                local.or_else(|| {
                    message.attributes.iter().find_map(|a| match a {
                        AddressAttribute::Address(ip) => Some(*ip),
                        _ => None,
                    })
                })
            })
            .filter(|ip| !ip.is_loopback())
            .collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses)
    })
}

/// All devices of the namespace but loopback.
pub fn devices() -> Result<Vec<Device>> {
    netlink(async |handle| {
        let links = handle.link().get().execute().try_collect::<Vec<_>>().await;
        let links = failing("read the devices", links)?;
        Ok(links
            .into_iter()
            .filter(|link| !link.header.flags.contains(LinkFlags::Loopback))
            .filter_map(|link| {
                let name = link.attributes.into_iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                })?;
                Some(Device { index: link.header.index, name })
            })
            .collect())
    })
}

/// Whether a device has Ethernet headers.
pub fn is_ethernet(device: &Device) -> Result<bool> {
    netlink(async |handle| {
        let link = handle.link().get().match_index(device.index).execute().try_next().await;
        let link = failing("read a device", link)?;
        Ok(link.is_some_and(|link| link.header.link_layer_type == LinkLayerType::Ether))
    })
}

/// The routes of the table `main` to what is directly behind a device, with the device's number.
pub fn direct_routes() -> Result<Vec<(IpNet, u32)>> {
    netlink(async |handle| Ok(routes(&handle).await?.iter().filter_map(direct_route).collect()))
}

/// The numbers of the devices that the default routes of the table `main` lead to, each once: by these the world
/// is reached.
pub fn default_devices() -> Result<Vec<u32>> {
    netlink(async |handle| {
        let mut found: Vec<u32> = routes(&handle).await?.iter().flat_map(default_route).collect();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    })
}

/// The routes of all tables and both families.
async fn routes(handle: &Handle) -> Result<Vec<RouteMessage>> {
    let mut found = Vec::new();
    for family in FAMILIES {
        let request = match family {
            IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        let routes = handle.route().get(request).execute().try_collect::<Vec<_>>().await;
        found.extend(failing("read the routes", routes)?);
    }
    Ok(found)
}

/// The devices that a route leads to, if it is a default route: one of several hops has several.
fn default_route(route: &RouteMessage) -> Vec<u32> {
    if route.header.kind != RouteType::Unicast
        || route.header.destination_prefix_length != 0
        || table_of(route) != u32::from(RouteHeader::RT_TABLE_MAIN)
    {
        return Vec::new();
    }
    let devices = route.attributes.iter().flat_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    });
    devices.collect()
}

fn direct_route(route: &RouteMessage) -> Option<(IpNet, u32)> {
    if route.header.kind != RouteType::Unicast || table_of(route) != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let (mut destination, mut device) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => destination = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    let net = IpNet::new(destination?, route.header.destination_prefix_length).ok()?;
    Some((net, device?))
}

/// Whether `lo` is up.
pub fn loopback_is_up() -> Result<bool> {
    netlink(async |handle| {
        let link = handle.link().get().match_index(LOOPBACK).execute().try_next().await;
        let link = failing("read the loopback device", link)?;
        Ok(link.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)))
    })
}

/// Runs `f` with a netlink connection on this thread, so that it is in this thread's namespace.
pub(crate) fn netlink<T>(f: impl AsyncFnOnce(Handle) -> Result<T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    failing_io("start the netlink connection", runtime)?.block_on(async {
        let connection = failing_io("open a netlink socket", rtnetlink::new_connection());
        let (connection, handle, _) = connection?;
        let connection = tokio::spawn(connection);
        let result = f(handle).await;
        connection.abort();
        result
    })
}

fn errno(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => -message.raw_code(),
        _ => 0,
    }
}

fn into_io(error: rtnetlink::Error) -> io::Error {
    match errno(&error) {
        0 => io::Error::other(error),
        code => io::Error::from_raw_os_error(code),
    }
}

fn tolerate<T: Default>(result: std::result::Result<T, rtnetlink::Error>, code: i32) -> io::Result<T> {
    result.map_err(into_io).or_else(|error| tolerate_io(error, code))
}

fn tolerate_io<T: Default>(error: io::Error, code: i32) -> io::Result<T> {
    if error.raw_os_error() == Some(code) { Ok(T::default()) } else { Err(error) }
}

pub(crate) fn failing<T>(action: &str, result: std::result::Result<T, rtnetlink::Error>) -> Result<T> {
    failing_io(action, result.map_err(into_io))
}

pub(crate) fn failing_io<T>(action: &str, result: io::Result<T>) -> Result<T> {
    result.map_err(|source| RoutingError { action: action.to_owned(), source, hint: "" })
}
