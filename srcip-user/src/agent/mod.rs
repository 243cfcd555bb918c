//! The node agent: finds the pods of its node, and steers those that ask for it.
//!
//! ```text
//!  Kubernetes API ─┐                 ┌── /proc and cgroups
//!  manifests ──────┴▶ source ──┐     ▼
//!                              ├▶ decide ──▶ reconcile ──▶ worker ──▶ backend ──▶ dataplane
//!  CNI plugin ──▶ socket ──────┘            (pure)
//! ```
//!
//! - [`pod`]: what is kept of a pod. [`source`]: where pods are learned from. [`discovery`]: where their
//!   network namespaces are.
//! - [`config`]: what the agent is to do. [`decide`]: what that means for a pod. [`reconcile`]: what to do
//!   about all of them. The last two are pure functions.
//! - [`worker`]: the loop that does it. [`backend`]: what it acts on. [`board`]: where each pod stands.
//! - [`admin`]: the agent's socket; [`protocol`]: what is said over it; [`handler`]: who answers; [`client`]:
//!   who asks.
//! - [`health`], [`metrics`]: how the agent is; [`report`] tells them. [`serve`]: shows it over HTTP.
//! - [`north_south`]: what it does for traffic from outside the cluster.
//! - [`run`]: puts all of it together.

pub mod admin;
pub mod backend;
pub mod board;
pub mod client;
pub mod config;
pub mod decide;
pub mod discovery;
pub mod handler;
pub mod health;
pub mod metrics;
pub mod north_south;
mod north_south_metrics;
mod packet;
pub mod pod;
pub mod protocol;
pub mod reconcile;
pub mod report;
pub mod run;
pub mod serve;
pub mod source;
pub mod worker;
