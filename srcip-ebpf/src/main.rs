//! srcip's programs. Read them in the order a connection meets them:
//!
//! 1. [`sock_ops`] gives the proxy's listener a slot the moment it listens; [`iter_tcp`] does it for
//!    listeners that were there before.
//! 2. [`sk_lookup`] (or [`tc`], the second engine) hands a client's connection to that listener.
//! 3. [`connect`] prepares the connection the proxy then opens to the application with the client's
//!    address: mark, source port, and a note that lets it pass `sk_lookup`. [`bind`] is for proxies
//!    that take their port early.
//! 4. [`sock_ops`] takes the note back once that connection stands or has failed.
//!
//! Every program only acts on pods in [`maps::PODS`] and leaves alone what it does not understand.

#![no_std]
#![no_main]

mod bind;
mod connect;
mod iter_tcp;
mod listeners;
mod maps;
mod sk_lookup;
mod sock_ops;
mod tc;

/// Dual MIT/GPL: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
