//! Empty: a build dependency has to be a library, and the eBPF programs are this package's binary.

#![no_std]
