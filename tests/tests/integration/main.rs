//! srcip with real proxies, across network namespaces.
//!
//! One file per behaviour. What both engines promise is tested with both, by `engines!`.

mod cluster;
mod scenario;

mod agent;
mod alone;
mod audit;
mod capabilities;
mod changes;
mod cli;
mod cni;
mod cni_install;
mod containers;
mod crash;
mod demonstration;
mod deploy;
mod detach;
mod devices;
mod discovery;
mod export;
mod first_packet;
mod ingress;
mod instances;
mod istio;
mod kube_proxy;
mod listeners;
mod loopback;
mod mirror;
mod neighbours;
mod north_south;
mod observe;
mod origin;
mod ports;
mod proxy_down;
mod sidecar;
mod soak;
mod source;
mod tcp;
mod telemetry;
mod top;
mod upgrade;

/// Makes a test of each function for each engine; the function takes the engine.
macro_rules! engines {
    ($($name:ident),+ $(,)?) => {
        mod sk_lookup { $(#[test] fn $name() { super::$name($crate::scenario::Engine::SkLookup) })+ }
        mod tc { $(#[test] fn $name() { super::$name($crate::scenario::Engine::Tc) })+ }
    };
}
pub(crate) use engines;
