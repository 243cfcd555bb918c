//! The only place that calls the kernel's helpers by hand; the rest is safe code.
//!
//! Every function here is sound for any argument, because the verifier proves it for every program
//! that uses it: contexts, sizes, ownership of sockets. Where a comment says "verified", that is meant.

#![expect(
    clippy::not_unsafe_ptr_arg_deref,
    reason = "the kernel's verifier refuses a program that passes a pointer which is not what it says"
)]

use core::ffi::{c_long, c_void};

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_sock_addr, bpf_sock_tuple, sockaddr},
    helpers::generated::{
        bpf_bind, bpf_for_each_map_elem, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_boot_ns,
        bpf_map_update_elem, bpf_setsockopt, bpf_sk_release, bpf_skc_lookup_tcp,
    },
    maps::{Array, SockHash},
};
pub use srcip_common::address::Address;
pub use srcip_common::keys::{AF_INET, AF_INET6};
use srcip_common::packet::Endpoint;

const SOL_SOCKET: i32 = 1;
/// For [`set_socket_option`]. In the kernel's table for BPF since Linux 6.0; ignored before.
pub const SO_REUSEADDR: i32 = 2;
/// For [`set_socket_option`]. For `connect` hooks since Linux 5.8.
pub const SO_MARK: i32 = 36;

/// TCP states by number: include/net/tcp_states.h, stable as user-space API.
pub mod tcp_state {
    pub const SYN_SENT: u32 = 2;
    pub const SYN_RECV: u32 = 3;
    pub const FIN_WAIT2: u32 = 5;
    pub const TIME_WAIT: u32 = 6;
    pub const CLOSE: u32 = 7;
    pub const CLOSE_WAIT: u32 = 8;
    pub const LAST_ACK: u32 = 9;
    pub const LISTEN: u32 = 10;
    pub const CLOSING: u32 = 11;
}

/// Nanoseconds since boot.
#[inline(always)]
pub fn boot_ns() -> u64 {
    // SAFETY: takes nothing and only reads a clock. Linux 5.8.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// Cookie of the network namespace the context's socket is in. Linux 5.7, in `sock_ops` 5.15.
#[inline(always)]
pub fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: verified: the pointer is the program's context.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Cookie of a socket, given as a `sock_ops` context or, in tracing programs, as the socket itself.
#[inline(always)]
pub fn socket_cookie(socket: *mut c_void) -> u64 {
    // SAFETY: verified: the pointer is what the program type's variant of the helper takes.
    unsafe { bpf_get_socket_cookie(socket) }
}

/// Sets an integer option at `SOL_SOCKET`. Errors are the kernel's, negative.
#[inline(always)]
pub fn set_socket_option(ctx: &impl EbpfContext, option: i32, value: u32) -> Result<(), c_long> {
    let mut value = value;
    // SAFETY: verified: the value is four bytes on the stack.
    let error = unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, option, (&raw mut value).cast(), 4) };
    if error == 0 { Ok(()) } else { Err(error) }
}

/// Marks a socket, given as a `sock_ops` context or, in the iterator over TCP sockets, as the socket itself.
/// Linux 4.13, in the iterator 5.15.
#[inline(always)]
pub fn set_mark(socket: *mut c_void, mark: u32) {
    let mut mark = mark;
    // SAFETY: verified: the pointer is what the program type's variant takes, and the value is four bytes on
    // the stack.
    let _ = unsafe { bpf_setsockopt(socket, SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) };
}

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: [u8; 2],
    address: u32,
    zero: [u8; 8],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: [u8; 2],
    flow: u32,
    address: [u32; 4],
    scope: u32,
}

/// Binds a connecting socket of `family` to `local`. The socket must be allowed to bind the address
/// itself: `IP_TRANSPARENT` is not implied. Linux 4.17.
#[inline(always)]
pub fn bind(ctx: *mut bpf_sock_addr, family: u16, local: Endpoint) -> Result<(), c_long> {
    let port = local.port.to_be_bytes();
    let error = if family == AF_INET {
        let address = local.address.v4_be().unwrap_or(0);
        let mut to = SockaddrIn { family: AF_INET, port, address, zero: [0; 8] };
        // SAFETY: verified: a sockaddr_in of 16 bytes on the stack.
        unsafe { bpf_bind(ctx, (&raw mut to).cast::<sockaddr>(), 16) }
    } else {
        let address = local.address.words();
        let mut to = SockaddrIn6 { family: AF_INET6, port, flow: 0, address, scope: 0 };
        // SAFETY: verified: a sockaddr_in6 of 28 bytes on the stack.
        unsafe { bpf_bind(ctx, (&raw mut to).cast::<sockaddr>(), 28) }
    };
    if error == 0 { Ok(()) } else { Err(error) }
}

#[repr(C)]
struct Tuple4 {
    source: u32,
    destination: u32,
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

#[repr(C)]
struct Tuple6 {
    source: [u32; 4],
    destination: [u32; 4],
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

/// Looks for the socket that would receive a segment, in the netns of the context. Calls `with` with
/// the socket and its state, then lets go of it. Linux 5.2.
#[inline(always)]
pub fn with_receiver<R>(
    ctx: &impl EbpfContext,
    source: Endpoint,
    destination: Endpoint,
    with: impl FnOnce(*mut c_void, u32) -> R,
) -> Option<R> {
    const CURRENT_NETNS: u64 = -1_i32 as u64;
    let source_port = source.port.to_be_bytes();
    let destination_port = destination.port.to_be_bytes();
    let socket = match (source.address.v4_be(), destination.address.v4_be()) {
        (Some(source), Some(destination)) => {
            let mut tuple = Tuple4 { source, destination, source_port, destination_port };
            let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
            // SAFETY: verified: 12 bytes on the stack say IPv4.
            unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, 12, CURRENT_NETNS, 0) }
        }
        _ => {
            let source = source.address.words();
            let destination = destination.address.words();
            let mut tuple = Tuple6 { source, destination, source_port, destination_port };
            let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
            // SAFETY: verified: 36 bytes on the stack say IPv6.
            unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, 36, CURRENT_NETNS, 0) }
        }
    };
    if socket.is_null() {
        return None;
    }
    // SAFETY: verified: not null, and held until the release below.
    let state = unsafe { (*socket).state };
    let result = with(socket.cast(), state);
    // SAFETY: verified: the reference taken by the lookup, released once.
    unsafe { bpf_sk_release(socket.cast()) };
    Some(result)
}

/// State of the socket that would receive a segment, if there is one.
#[inline(always)]
pub fn receiver_state(ctx: &impl EbpfContext, source: Endpoint, destination: Endpoint) -> Option<u32> {
    with_receiver(ctx, source, destination, |_, state| state)
}

/// Puts a socket, as a lookup or an iterator delivers it, into a SockHash unless `flags` forbid it.
/// Linux 5.10.
#[inline(always)]
pub fn store_socket<K>(map: &SockHash<K>, key: &K, socket: *mut c_void, flags: u64) -> Result<(), c_long> {
    let map = core::ptr::from_ref(map).cast_mut().cast::<c_void>();
    // SAFETY: verified: the map's own key, and a socket that the caller holds as the value.
    let error = unsafe { bpf_map_update_elem(map, core::ptr::from_ref(key).cast(), socket, flags) };
    if error == 0 { Ok(()) } else { Err(error) }
}

/// Calls `each` for the indices of `map` in turn, until it returns 1.
///
/// The verifier follows a loop round by round, along every way through each round; a callback it looks at a
/// few times. For the search of a port that is 9,000 instructions instead of 550,000. Linux 5.13.
#[inline(always)]
pub fn for_each<T, C>(
    map: &Array<T>,
    each: unsafe extern "C" fn(*mut c_void, *const u32, *mut c_void, *mut C) -> c_long,
    context: &mut C,
) {
    let map = core::ptr::from_ref(map).cast_mut().cast::<c_void>();
    // SAFETY: verified: the callback's arguments are the map, a key and a value of it, and this context.
    unsafe { bpf_for_each_map_elem(map, each as *mut c_void, (&raw mut *context).cast(), 0) };
}

/// Adds to a number in a map, in one instruction that nothing can interrupt.
///
/// By hand, because `core` has no atomic arithmetic for a target without compare-and-swap, which the
/// first BPF instruction set is.
#[inline(always)]
pub fn add(number: &u64, n: u64) {
    // SAFETY: verified: the number lies in a map, where anybody may write at any time and no reference
    // is taken for unchanging; the instruction adds to it and touches nothing else.
    unsafe {
        core::arch::asm!("lock *(u64 *)({number} + 0) += {n}", number = in(reg) number, n = in(reg) n);
    }
}

/// Adds one to a number in a map and returns what it was, for programs that share it. Linux 5.12.
#[inline(always)]
pub fn fetch_increment(number: &u64) -> u64 {
    let mut one = 1_u64;
    // SAFETY: as in `add`.
    unsafe {
        core::arch::asm!(
            "{one} = atomic_fetch_add((u64 *)({number} + 0), {one})",
            number = in(reg) number,
            one = inout(reg) one,
        );
    }
    one
}

/// Reads one field of a context, exactly where and when it is written.
#[macro_export]
macro_rules! field {
    ($context:expr, $($field:tt)+) => {{
        let context = $context;
        // SAFETY: verified: a context, or a socket that is not null, is valid while the program runs.
        unsafe { (&raw const (*context).$($field)+).read_volatile() }
    }};
}

/// Reads the four words of an IPv6 address of a context.
#[macro_export]
macro_rules! words {
    ($context:expr, $v6:ident) => {
        [
            $crate::sys::field!($context, $v6[0]),
            $crate::sys::field!($context, $v6[1]),
            $crate::sys::field!($context, $v6[2]),
            $crate::sys::field!($context, $v6[3]),
        ]
    };
}

/// Reads an address of a context that serves both families.
///
/// All words are read before the family decides: out of two branches LLVM would make one read at a
/// computed offset, and the verifier says "dereference of modified ctx ptr disallowed".
#[macro_export]
macro_rules! address {
    ($context:expr, $family:expr, $v4:ident, $v6:ident) => {{
        let v4 = $crate::sys::field!($context, $v4);
        let v6 = $crate::sys::words!($context, $v6);
        if $family == $crate::sys::AF_INET {
            $crate::sys::Address::from_v4_be(v4)
        } else {
            $crate::sys::Address::from_v6_be(v6)
        }
    }};
}

pub use {address, field, words};
