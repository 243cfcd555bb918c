//! srcip with real proxies, across network namespaces.
//!
//! One file per behaviour. What both engines promise is tested with both, by `engines!`.

mod scenario;

mod audit;
mod changes;
mod cli;
mod crash;
mod detach;
mod devices;
mod export;
mod instances;
mod listeners;
mod loopback;
mod mirror;
mod neighbours;
mod observe;
mod origin;
mod ports;
mod proxy_down;
mod soak;
mod tcp;
mod telemetry;
mod top;

/// Makes a test of each function for each engine; the function takes the engine.
macro_rules! engines {
    ($($name:ident),+ $(,)?) => {
        mod sk_lookup { $(#[test] fn $name() { super::$name($crate::scenario::Engine::SkLookup) })+ }
        mod tc { $(#[test] fn $name() { super::$name($crate::scenario::Engine::Tc) })+ }
    };
}
pub(crate) use engines;
