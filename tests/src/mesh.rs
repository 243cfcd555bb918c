//! Rule sets of others: Istio's in a pod, kube-proxy's on a node. They are what srcip is compared with and
//! what its audit has to recognise.

use std::net::IpAddr;

use anyhow::Result;

use crate::{Family, host::Host};

/// What istio-init installs by default: NAT to the sidecar, for what comes in, what goes out, and what the
/// sidecar sends to its own pod. `uid` is the sidecar's user, whom these rules leave alone otherwise.
pub fn istio_redirect(family: Family, uid: u32) -> String {
    let (loopback, hidden) = loopbacks(family);
    format!(
        "*nat\n:ISTIO_INBOUND - [0:0]\n:ISTIO_IN_REDIRECT - [0:0]\n:ISTIO_OUTPUT - [0:0]\n:ISTIO_REDIRECT - [0:0]\n\
         -A PREROUTING -p tcp -j ISTIO_INBOUND\n\
         -A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
         -A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT\n\
         -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006\n\
         -A ISTIO_OUTPUT -s {hidden} -o lo -j RETURN\n\
         -A ISTIO_OUTPUT ! -d {loopback} -o lo -p tcp ! --dport 15008 -m owner --uid-owner {uid} -j ISTIO_IN_REDIRECT\n\
         -A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {uid} -j RETURN\n\
         -A ISTIO_OUTPUT -m owner --uid-owner {uid} -j RETURN\n\
         -A ISTIO_OUTPUT -d {loopback} -j RETURN\n\
         -A ISTIO_OUTPUT -j ISTIO_REDIRECT\n\
         -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001\n\
         COMMIT\n"
    )
}

/// The user and the group of Istio's sidecar. In TPROXY mode it is root with this group.
pub const ISTIO_ID: u32 = 1337;

/// Does to a pod what istio-init does for `interceptionMode: TPROXY`.
pub fn install_istio_tproxy(pod: &Host) -> Result<()> {
    pod.feed("iptables-restore", &istio_tproxy(Family::V4))?;
    pod.feed("ip6tables-restore", &istio_tproxy(Family::V6))?;
    for family in ["-4", "-6"] {
        pod.ip(&format!("{family} rule add fwmark 1337 lookup 133"))?;
        // It does not mind a route that is there already.
        if let Err(error) = pod.ip(&format!("{family} route add local default dev lo table 133"))
            && !error.to_string().contains("File exists")
        {
            return Err(error);
        }
    }
    Ok(())
}

fn istio_tproxy(family: Family) -> String {
    let gid = ISTIO_ID;
    let (loopback, hidden) = loopbacks(family);
    format!(
        "*mangle\n:ISTIO_DIVERT - [0:0]\n:ISTIO_INBOUND - [0:0]\n:ISTIO_TPROXY - [0:0]\n\
         -A PREROUTING -p tcp -j ISTIO_INBOUND\n\
         -A PREROUTING -p tcp -m mark --mark 1337 -j CONNMARK --save-mark\n\
         -A OUTPUT -p tcp -o lo -m mark --mark 1337 -j RETURN\n\
         -A OUTPUT ! -d {loopback} -p tcp -o lo -m owner --uid-owner {gid} -j MARK --set-mark 1338\n\
         -A OUTPUT ! -d {loopback} -p tcp -o lo -m owner --gid-owner {gid} -j MARK --set-mark 1338\n\
         -A OUTPUT -p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark\n\
         -A ISTIO_INBOUND -p tcp -m mark --mark 1337 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp -s {hidden} -i lo -j RETURN\n\
         -A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark 1338 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN\n\
         -A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT\n\
         -A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY\n\
         -A ISTIO_DIVERT -j MARK --set-mark 1337\n\
         -A ISTIO_DIVERT -j ACCEPT\n\
         -A ISTIO_TPROXY ! -d {loopback} -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1337/0xffffffff\n\
         COMMIT\n\
         *nat\n:ISTIO_INBOUND - [0:0]\n:ISTIO_IN_REDIRECT - [0:0]\n:ISTIO_OUTPUT - [0:0]\n:ISTIO_REDIRECT - [0:0]\n\
         -A OUTPUT -p tcp -j ISTIO_OUTPUT\n\
         -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006\n\
         -A ISTIO_OUTPUT -s {hidden} -o lo -j RETURN\n\
         -A ISTIO_OUTPUT ! -d {loopback} -o lo -p tcp ! --dport 15008 -m owner --uid-owner {gid} -j ISTIO_IN_REDIRECT\n\
         -A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {gid} -j RETURN\n\
         -A ISTIO_OUTPUT -m owner --uid-owner {gid} -j RETURN\n\
         -A ISTIO_OUTPUT ! -d {loopback} -o lo -p tcp ! --dport 15008 -m owner --gid-owner {gid} -j ISTIO_IN_REDIRECT\n\
         -A ISTIO_OUTPUT -o lo -m owner ! --gid-owner {gid} -j RETURN\n\
         -A ISTIO_OUTPUT -m owner --gid-owner {gid} -j RETURN\n\
         -A ISTIO_OUTPUT -d {loopback} -j RETURN\n\
         -A ISTIO_OUTPUT -j ISTIO_REDIRECT\n\
         -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001\n\
         COMMIT\n"
    )
}

/// Loopback, and the address that a sidecar dials from unless it keeps the client's.
fn loopbacks(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("127.0.0.1/32", "127.0.0.6/32"),
        Family::V6 => ("::1/128", "::6/128"),
    }
}

/// A Service of type NodePort with one endpoint, as kube-proxy's iptables mode writes it on one node.
#[derive(Clone, Copy, Debug)]
pub struct NodePort {
    /// The port on every node.
    pub node_port: u16,
    /// The endpoint.
    pub endpoint: (IpAddr, u16),
    /// `externalTrafficPolicy: Local`.
    pub local: bool,
    /// Whether the endpoint is on this node.
    pub endpoint_is_here: bool,
}

impl NodePort {
    /// For `iptables-restore`.
    pub fn rules(self) -> String {
        let Self { node_port, endpoint: (ip, port), local, endpoint_is_here } = self;
        // Under Cluster, what comes from outside is marked to be masqueraded; under Local, it goes to an
        // endpoint of this node or nowhere.
        let external = match (local, endpoint_is_here) {
            (false, _) => "-A KUBE-EXT-WEB -j KUBE-MARK-MASQ\n-A KUBE-EXT-WEB -j KUBE-SVC-WEB\n".to_owned(),
            (true, true) => "-A KUBE-EXT-WEB -j KUBE-SVC-WEB\n".to_owned(),
            (true, false) => String::new(),
        };
        format!(
            "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-EXT-WEB - [0:0]\n\
             :KUBE-SVC-WEB - [0:0]\n:KUBE-SEP-WEB - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
             -A PREROUTING -j KUBE-SERVICES\n\
             -A POSTROUTING -j KUBE-POSTROUTING\n\
             -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
             -A KUBE-NODEPORTS -p tcp --dport {node_port} -j KUBE-EXT-WEB\n\
             {external}\
             -A KUBE-SVC-WEB -j KUBE-SEP-WEB\n\
             -A KUBE-SEP-WEB -p tcp -j DNAT --to-destination {ip}:{port}\n\
             -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
             -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
             -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
             -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
             COMMIT\n"
        )
    }
}
