//! How often something happens.

use std::time::Duration;

/// What a rate is an average over.
pub const WINDOW: Duration = Duration::from_secs(5);

/// Parts the window moves on by.
const BUCKETS: usize = 10;

/// Counts of the last [`WINDOW`], so that a rate is steady, yet nothing once nothing happens any more.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    buckets: [u64; BUCKETS],
    /// Number of the newest bucket since the beginning of time.
    newest: u64,
}

impl Rate {
    /// `count` more have happened. `now` is the time since the start.
    pub fn add(&mut self, count: u64, now: Duration) {
        self.turn(now);
        let bucket = self.newest as usize % BUCKETS;
        self.buckets[bucket] = self.buckets[bucket].saturating_add(count);
    }

    /// How many a second. Soon after the start it is the average since then, but at least over a second.
    pub fn per_second(mut self, now: Duration) -> f64 {
        self.turn(now);
        let sum: u64 = self.buckets.iter().fold(0, |sum, count| sum.saturating_add(*count));
        sum as f64 / now.clamp(Duration::from_secs(1), WINDOW).as_secs_f64()
    }

    /// Empties the buckets whose time is over.
    fn turn(&mut self, now: Duration) {
        let number = (now.as_nanos() / (WINDOW.as_nanos() / BUCKETS as u128)) as u64;
        let passed = number.saturating_sub(self.newest).min(BUCKETS as u64);
        for i in 1..=passed {
            self.buckets[(self.newest + i) as usize % BUCKETS] = 0;
        }
        // Only so many have been emptied; those further on are the same ones.
        if number > self.newest {
            self.newest = number;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn steady() {
        let mut rate = Rate::default();
        for i in 0..1000 {
            rate.add(1, ms(i * 100));
        }
        let per_second = rate.per_second(ms(99_999));
        assert!((per_second - 10.0).abs() < 0.2, "{per_second}");
    }

    #[test]
    fn at_the_start() {
        let mut rate = Rate::default();
        rate.add(4, ms(100));
        assert!((rate.per_second(ms(100)) - 4.0).abs() < 1e-9);
        assert!((rate.per_second(ms(2000)) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn forgets() {
        let mut rate = Rate::default();
        rate.add(10, ms(60_000));
        assert!((rate.per_second(ms(61_000)) - 2.0).abs() < 1e-9);
        assert!((rate.per_second(ms(64_400)) - 2.0).abs() < 1e-9);
        assert!(rate.per_second(ms(65_001)).abs() < 1e-9);
        // After a long silence as well, and when the clock stands still.
        rate.add(5, ms(1_000_000));
        assert!((rate.per_second(ms(999_000)) - 1.0).abs() < 1e-9);
    }
}
