//! What the tests of `pageferry_copy_dma` share: the board's DMA engine, and one that misbehaves.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

use std::fs;
use std::process::Command;

/// The test part that is a DMA engine.
const ENGINE: &str = "pageferry_dma_test";

/// How the engine behaves, as `mode` of the test part says it.
#[derive(Clone, Copy, Debug)]
pub enum Mode {
    Honest,
    Fails,
    Lies,
    Misdirects,
    Hangs,
    Late,
    Quiet,
    Refuses,
    Rejects,
    Tires,
}

/// The engine that misbehaves. It is loaded once: channels that were given up keep it there.
pub struct Engine;

impl Engine {
    /// The parameter that has the module take its channels alone.
    pub const DEVICES: &str = "devices=pageferry_dma_test";

    /// Loads it, or takes the one that is there; honest, until told otherwise. Says why there is
    /// none.
    pub fn get() -> Option<Self> {
        let file = format!("/copiers/{ENGINE}.ko");
        if !fs::exists(&file).expect("a path") {
            eprintln!("skipped: this kernel has no DMA engines");
            return None;
        }
        if !fs::exists(format!("/sys/module/{ENGINE}")).expect("sysfs") {
            let out = Command::new("insmod").arg(file).output().expect("busybox");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        let engine = Self;
        engine.set("mask_bits", 64);
        engine.set("descriptors", 8);
        engine.set("unordered", 0);
        engine.be(Mode::Honest);
        Some(engine)
    }

    pub fn be(&self, mode: Mode) {
        self.set("mode", mode as u64);
    }

    pub fn set(&self, parameter: &str, value: u64) {
        let path = format!("/sys/module/{ENGINE}/parameters/{parameter}");
        fs::write(path, value.to_string()).expect("in range");
    }

    pub fn late_writes(&self) -> u64 {
        let path = format!("/sys/module/{ENGINE}/parameters/late_writes");
        let text = fs::read_to_string(path).expect("readable");
        text.trim().parse().expect("a number")
    }
}
