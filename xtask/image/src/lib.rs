//! Container images, written file by file: no engine, no registry, no base image.
//!
//! - [`tree`]: the files of an image.
//! - [`layout`]: the archive that `ctr images import`, `podman load` and `skopeo` take.
//! - [`srcip`]: what srcip's own image is made of.
//!
//! The same input gives the same bytes: everything is sorted, owned by root and as old as the epoch.

pub mod layout;
pub mod srcip;
pub mod tree;
