//! Which endpoint a flow goes to: the one it has, the one its client has, or the table's.

#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value it would be copied to the short stack"
)]

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use srcip_common::{
    address::Address,
    northsouth::{
        Affinity, AffinityKey, CLOSING, Direction, ENTERED_HERE, Endpoint, Flow, FlowKey, RESTRICTED,
        SENT_HERE, TUNNEL_RETURN, UDP_IDLE_NS,
        counter::ServiceCounter,
        lookup,
        packet::{Family, UDP},
        takes_new,
    },
};
use srcip_ebpf::sys;

use crate::{
    Verdict,
    maps::{self, NS_AFFINITY, NS_FLOWS},
    work::{Request, Work},
};

/// Finds the endpoint of a request's flow, chosen now if it has none, for [`Work::target`].
/// [`Verdict::REDIRECT`] if there is one, else what becomes of the packet.
#[inline(never)]
pub fn endpoint(work: &mut Work) -> Verdict {
    let id = work.request.frontend.service;
    let Some(service) = maps::service(id) else { return Verdict::PASS };
    work.target.tunnel_return = service.flags & TUNNEL_RETURN != 0;
    if let Some(flow) = maps::flow(&work.request.key)
        && is_good(flow, &work.request)
    {
        maps::touch(flow, work.request.ports.closes());
        work.target.address = flow.address;
        work.target.node = flow.node;
        work.target.port = flow.port;
        if !work.request.from.is_unspecified() {
            follow_entry(work);
        }
        return Verdict::REDIRECT;
    }
    if work.request.frontend.flags & RESTRICTED != 0 && !maps::in_range(id, work.request.key.source) {
        return Verdict::drop_of(id, ServiceCounter::SourceRefused);
    }
    choose(work, service.affinity_ns)
}

/// Whether the packet belongs to the flow that is known by its ends.
#[inline(always)]
fn is_good(flow: &Flow, request: &Request) -> bool {
    if flow.service != request.frontend.service {
        return false;
    }
    let is_udp = request.key.protocol == UDP;
    if !is_udp && !request.ports.opens() {
        // Whatever became of the endpoint: nobody else can go on with the connection.
        return true;
    }
    if flow.flags & CLOSING != 0 || is_udp && is_idle(flow, UDP_IDLE_NS) {
        return false;
    }
    maps::endpoint(flow.service, flow.index).is_some_and(|endpoint| endpoint.address == flow.address)
}

#[inline(always)]
fn is_idle(flow: &Flow, ns: u64) -> bool {
    sys::boot_ns().wrapping_sub(flow.seen_ns) > ns
}

/// A client's packets may enter by another node from now on; where answers go back through it, they follow.
#[inline(always)]
fn follow_entry(work: &mut Work) {
    work.key = reply_key(&work.request.key, work.target.address, work.target.port);
    if let Some(reply) = maps::flow(&work.key)
        && reply.node != work.request.from
    {
        reply.node = work.request.from;
    }
}

/// The ends of the answers to a request.
#[inline(always)]
fn reply_key(request: &FlowKey, address: Address, port: u16) -> FlowKey {
    FlowKey::new(Direction::Reply, request.protocol, (address, port), (request.source, request.source_port))
}

#[inline(never)]
fn choose(work: &mut Work, affinity_ns: u64) -> Verdict {
    let id = work.request.frontend.service;
    let kind = if work.request.from.is_unspecified() { ENTERED_HERE } else { SENT_HERE };
    work.affinity_key = AffinityKey { service: id, client: work.request.key.source };
    let kept = if affinity_ns == 0 { None } else { kept(&work.affinity_key, affinity_ns, kind) };
    let mut hash = lookup::hash_of(&work.request.key, affinity_ns != 0);
    let mut found = false;
    for attempt in 0..lookup::ATTEMPTS {
        // Looked up each time: its table may just have been replaced, and the endpoint it named removed.
        let Some(service) = maps::service(id) else { break };
        let index = match kept {
            Some(index) if attempt == 0 => index,
            _ => u32::from(service.tables[kind][lookup::place(hash)]),
        };
        hash = lookup::next(hash, attempt);
        let Some(endpoint) = maps::endpoint(id, index) else { continue };
        found = true;
        if note(work, index, endpoint) {
            if affinity_ns != 0 {
                work.affinity =
                    Affinity { seen_ns: sys::boot_ns(), address: endpoint.address, index, padding: 0 };
                let _ = NS_AFFINITY.insert(&work.affinity_key, &work.affinity, BPF_ANY.into());
            }
            maps::count_of(id, kind_of_flow(work), 1);
            return Verdict::REDIRECT;
        }
    }
    Verdict::drop_of(id, if found { ServiceCounter::Collision } else { ServiceCounter::NoEndpoint })
}

/// Each flow is one of the first two on one node alone, whatever nodes it passes.
#[inline(always)]
fn kind_of_flow(work: &Work) -> ServiceCounter {
    if !work.request.from.is_unspecified() {
        ServiceCounter::NewFlowReceived
    } else if work.target.node.is_unspecified() {
        ServiceCounter::NewFlow
    } else {
        ServiceCounter::NewFlowHandedOn
    }
}

/// The number of the endpoint that this client has had, if that still takes new flows.
#[inline(always)]
fn kept(key: &AffinityKey, timeout_ns: u64, kind: usize) -> Option<u32> {
    let affinity = NS_AFFINITY.get_ptr(key)?;
    // SAFETY: verified: inside the map's value. An LRU map may hand the element to another client while it is
    // read; the endpoint is compared below, and at worst the client goes to another one.
    let affinity = unsafe { affinity.read_volatile() };
    if sys::boot_ns().wrapping_sub(affinity.seen_ns) > timeout_ns {
        return None;
    }
    let endpoint = maps::endpoint(key.service, affinity.index)?;
    (endpoint.address == affinity.address && endpoint.flags & takes_new(kind) != 0).then_some(affinity.index)
}

/// Notes the flow, for both directions, and makes the endpoint the target. `false` if the endpoint has another flow
/// that its answers could not be told from: from the same client address and port, by another frontend.
#[inline(never)]
fn note(work: &mut Work, index: u32, endpoint: &Endpoint) -> bool {
    work.flow = Flow {
        seen_ns: sys::boot_ns(),
        address: work.request.key.destination,
        node: work.request.from,
        service: work.request.frontend.service,
        index,
        port: work.request.key.destination_port,
        flags: 0,
        padding: 0,
    };
    if endpoint.node.is_unspecified() {
        work.key = reply_key(&work.request.key, endpoint.address, endpoint.port);
        if NS_FLOWS.insert(&work.key, &work.flow, BPF_NOEXIST.into()).is_err() {
            if let Some(other) = maps::flow(&work.key)
                && other.bars((work.flow.address, work.flow.port), sys::boot_ns())
            {
                return false;
            }
            let _ = NS_FLOWS.insert(&work.key, &work.flow, BPF_ANY.into());
        }
    }
    work.flow.address = endpoint.address;
    work.flow.node = endpoint.node;
    work.flow.port = endpoint.port;
    let _ = NS_FLOWS.insert(&work.request.key, &work.flow, BPF_ANY.into());
    work.target.address = endpoint.address;
    work.target.node = endpoint.node;
    work.target.port = endpoint.port;
    true
}

/// The family's "nobody".
#[inline(always)]
pub fn nobody(family: Family) -> Address {
    match family {
        Family::V4 => Address::from_v4_be(0),
        Family::V6 => Address::from_v6_be([0; 4]),
    }
}
