//! Telemetry: every connection's origin.
//!
//! ```text
//! sock_ops ──▶ ring buffer ──▶ watch ──▶ join ──▶ observer ──▶ observe, top, audit, export
//! ```
//!
//! - [`watch`]: loads the watching program and reads its events.
//! - [`workload`]: whose they are. [`clock`]: when they happened.
//! - [`join`]: puts the two legs of a connection together.
//! - [`record`]: what is told of a connection. [`filter`]: which ones are wanted.
//! - [`observer`]: all of that together. [`history`]: connections from before.
//! - [`export`]: access log, metrics, OpenTelemetry.

pub mod clock;
pub mod export;
pub mod filter;
pub mod history;
pub mod join;
pub mod observer;
pub mod record;
pub mod watch;
pub mod workload;
