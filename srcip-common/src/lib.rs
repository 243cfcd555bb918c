//! Types that srcip's eBPF programs and its user-space side share.
//!
//! Everything that crosses a BPF map is `#[repr(C)]` with its padding written out: the kernel hashes
//! a key's bytes, padding included, so an uninitialised byte would make a key that is never found.
//! Sizes are checked at compile time on both sides. Nothing here needs a kernel, so all of it is
//! tested on the host.

#![no_std]

#[cfg(test)]
extern crate std;

pub mod address;
pub mod counters;
pub mod keys;
pub mod northsouth;
pub mod packet;
pub mod pod;
pub mod ports;
pub mod telemetry;

/// Layout of the pinned maps. Raised whenever the key or value of a pinned map changes shape, so that
/// one version of srcip never misreads what another one left in the kernel.
pub const LAYOUT_VERSION: u32 = 2;

/// Says which types may be copied to and from a map byte by byte.
macro_rules! map_types {
    ($($ty:ty: $size:expr),+ $(,)?) => {$(
        const _: () = assert!(core::mem::size_of::<$ty>() == $size);
        // SAFETY: the type is `repr(C)`, `Copy`, holds only integers and arrays of them, and writes its
        // padding out as fields, so every bit pattern is a value and no byte is uninitialised.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $ty {}
    )+};
}

map_types! {
    address::Address: 16,
    counters::Counters: 80,
    keys::AddressKey: 24,
    keys::ConnectionKey: 48,
    keys::ListenerKey: 16,
    keys::RegisteredKey: 16,
    northsouth::Affinity: 32,
    northsouth::AffinityKey: 20,
    northsouth::Config: 32,
    northsouth::Endpoint: 36,
    northsouth::EndpointKey: 8,
    northsouth::Flow: 56,
    northsouth::FlowKey: 40,
    northsouth::Frontend: 8,
    northsouth::FrontendKey: 20,
    northsouth::RangeKey: 20,
    northsouth::Service: 12304,
    northsouth::counter::ServiceCounters: 1024,
    pod::Pod: 8232,
    telemetry::Event: 96,
    telemetry::WatchCounters: 32,
}
