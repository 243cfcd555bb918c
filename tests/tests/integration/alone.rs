//! Tests that measure what the machine can do. `cargo xtask test` runs them after all others, one at a time.

mod full_node;
mod many_pods;
