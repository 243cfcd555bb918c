//! The CNI plugin: steers a pod before its first packet.
//!
//! ```text
//!  kubelet ──▶ runtime ──▶ bridge, … ──▶ srcip-cni ──▶ agent
//!                              result ───────▲ └─▶ the same result, once the pod is steered
//! ```
//!
//! - [`plugin`]: what it does. [`spec`]: how it is called, and how it fails. [`config`]: what it is told.
//! - [`attachment`]: what the runtime calls an attachment.
//! - [`install`]: how it gets onto the node and away again; [`keep`]: how it stays. [`conflist`]: networks'
//!   configurations as text.

pub mod attachment;
pub mod config;
pub mod conflist;
pub mod install;
pub mod keep;
pub mod plugin;
pub mod spec;
