//! Processor time: what something takes where nobody else wants the processors.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// A clock tick, in which the kernel counts: `sysconf(_SC_CLK_TCK)` has been 100 a second on all of Linux.
const TICK: Duration = Duration::from_millis(10);

/// Of a process, all of its threads included, in steps of 10 ms.
pub fn of_process(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc_pid_stat(5): utime and stime are the 14th and the 15th; the second may have blanks in it.
    let fields = stat.rsplit_once(')').context("no name in the status of a process")?.1.split_whitespace();
    let times = fields.skip(11).take(2).map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    Ok(TICK * times.iter().sum())
}

/// Of everybody on this machine, in steps of 10 ms.
pub fn of_machine() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("an empty /proc/stat")?;
    // proc_stat(5)
    let ticks: Vec<u64> = line.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let idle = ticks[3] + ticks[4];
    Ok(Duration::from_millis((ticks[..8].iter().sum::<u64>() - idle) * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_part_of_the_machine() {
        let before = of_process(std::process::id()).unwrap();
        while of_process(std::process::id()).unwrap() == before {}
        assert!(of_machine().unwrap() > before);
    }
}
