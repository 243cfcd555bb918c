//! `srcip top`: a live view of clients and workloads.
//!
//! ```text
//! observer ──records──▶ model ──▶ snapshot ──▶ app ──▶ view ──▶ terminal
//!                                               ▲
//!                                 keys ─────────┘
//! ```
//!
//! - [`model`]: adds up what records tell. [`rate`]: events per second.
//! - [`snapshot`]: the model at one moment, in lines that can be sorted and filtered.
//! - [`app`]: what the user has chosen. [`keys`]: how.
//! - [`columns`]: what is shown of a line. [`view`]: draws it all.
//! - [`terminal`]: takes the terminal over and gives it back. [`run`]: goes round.
//!
//! All but the last two neither read a clock nor touch anything outside.

pub mod app;
pub mod columns;
pub mod keys;
pub mod model;
pub mod rate;
pub mod run;
pub mod snapshot;
pub mod terminal;
pub mod view;
