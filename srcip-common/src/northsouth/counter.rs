//! What the north-south programs count: by reason, and by service.

/// Declares the counters, each with its name for people and machines.
macro_rules! counters {
    (
        $(#[$whole:meta])+ pub enum $counter:ident {
            $($(#[$doc:meta])+ $variant:ident = $name:literal),+ $(,)?
        }
    ) => {
        $(#[$whole])+
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u32)]
        pub enum $counter { $($(#[$doc])+ $variant),+ }

        impl $counter {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// Its stable name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

counters! {
    /// A reason to count; its number is its place in the map, so new ones come last.
    pub enum Counter {
        /// Flows that entered the cluster here, for an endpoint on this node.
        NewFlow = "new_flows",
        /// Packets to an endpoint on this node.
        ToEndpoint = "to_endpoint",
        /// Packets sent to the node that has the endpoint.
        ToNode = "to_node",
        /// Packets that another node has sent here.
        FromNode = "from_node",
        /// Answers that went straight to the client.
        Reply = "replies",
        /// Answers sent back to the node the client came to.
        ReplyToNode = "replies_to_node",
        /// ICMP errors of a flow, translated.
        IcmpTranslated = "icmp_translated",
        /// Opening segments whose maximum segment size was lowered.
        MssClamped = "mss_clamped",
        /// Packets too big for the way, whose sender was told.
        TooBigTold = "too_big_told",
        /// Dropped: no endpoint takes new flows.
        NoEndpoint = "dropped_no_endpoint",
        /// Dropped: the client is in none of the source ranges.
        SourceRefused = "dropped_source_range",
        /// Dropped: every endpoint tried has a flow with the same client address and port by another frontend.
        Collision = "dropped_collision",
        /// Dropped: encapsulated for a frontend of ours, by an address that is no node.
        Spoofed = "dropped_spoofed_encapsulation",
        /// Dropped: the kernel failed to rewrite the packet, out of memory for one.
        Failed = "dropped_failed",
        /// Passed on untouched: fragments of a datagram whose first one, which has the ports, is not known.
        Fragment = "passed_fragments",
        /// Passed on untouched: lengths or headers that make no sense, a source that no host has.
        Malformed = "passed_malformed",
        /// Passed on untouched: the hop limit is used up.
        HopLimit = "passed_hop_limit",
        /// Passed on untouched: no route, or none that forwards.
        NoRoute = "passed_no_route",
        /// Passed on untouched: too big, and the sender cannot be told.
        TooBig = "passed_too_big",
        /// Flows that entered the cluster here, for an endpoint on another node.
        NewFlowHandedOn = "new_flows_handed_on",
        /// Flows that another node has sent here.
        NewFlowReceived = "new_flows_received",
    }
}

counters! {
    /// What is counted of each service; its number is its place in a [`Counts`].
    pub enum ServiceCounter {
        /// Flows that entered the cluster here, for an endpoint on this node.
        NewFlow = "new_flows",
        /// Flows that entered the cluster here, for an endpoint on another node.
        NewFlowHandedOn = "new_flows_handed_on",
        /// Flows that another node has sent here.
        NewFlowReceived = "new_flows_received",
        /// Octets of IP to endpoints on this node.
        RequestBytes = "request_bytes",
        /// Octets of IP from them.
        ReplyBytes = "reply_bytes",
        /// Packets dropped: no endpoint takes new flows.
        NoEndpoint = "dropped_no_endpoint",
        /// Packets dropped: the client is in none of the source ranges.
        SourceRefused = "dropped_source_range",
        /// Packets dropped: every endpoint tried has a flow with the same client address and port.
        Collision = "dropped_collision",
    }
}

impl ServiceCounter {
    /// The counter of all services that tells the same, if there is one.
    pub const fn of_all(self) -> Option<Counter> {
        match self {
            Self::NewFlow => Some(Counter::NewFlow),
            Self::NewFlowHandedOn => Some(Counter::NewFlowHandedOn),
            Self::NewFlowReceived => Some(Counter::NewFlowReceived),
            Self::NoEndpoint => Some(Counter::NoEndpoint),
            Self::SourceRefused => Some(Counter::SourceRefused),
            Self::Collision => Some(Counter::Collision),
            Self::RequestBytes | Self::ReplyBytes => None,
        }
    }
}

/// A number for each [`ServiceCounter`].
pub type Counts = [u64; ServiceCounter::ALL.len()];

/// Parts of a [`ServiceCounters`].
pub const PARTS: usize = 16;

/// What has been counted of one service.
///
/// Each processor adds to one of the parts, so that few meet at one. A copy for every processor would take more room
/// than all else of a service where there are many processors, and the kernel runs out of such copies
/// (`pcpu_alloc` that may not sleep) when thousands of services come at a time.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServiceCounters {
    /// Together they are the numbers.
    pub parts: [Counts; PARTS],
}

impl ServiceCounters {
    /// Nothing counted yet.
    pub const ZERO: Self = Self { parts: [[0; ServiceCounter::ALL.len()]; PARTS] };

    /// The numbers.
    pub fn sum(&self) -> Counts {
        core::array::from_fn(|which| self.parts.iter().map(|part| part[which]).fold(0, u64::wrapping_add))
    }
}
