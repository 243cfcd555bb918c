//! srcip with real proxies, across network namespaces.

mod basics;
