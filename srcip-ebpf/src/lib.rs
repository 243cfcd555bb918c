//! What the two eBPF objects share: the steering programs (`main.rs`) and the watching one (`watch/`).

#![no_std]
// For one instruction: see `sys::increment`. The build allows unstable features to this crate alone.
#![feature(asm_experimental_arch)]

pub mod ends;
pub mod sys;
