//! Watches.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::channel::Sender;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::{
    Shared,
    answer::status,
    store::{Resource, Selector},
};

/// Between two bookmarks; a real server leaves a minute.
const BOOKMARKS: Duration = Duration::from_millis(200);

/// No watch lasts longer.
const LONGEST: Duration = Duration::from_secs(300);

/// What a watch is told.
pub(super) struct Watch {
    pub(super) shared: Arc<Shared>,
    pub(super) resource: Resource,
    pub(super) kind: &'static str,
    pub(super) selector: Selector,
    pub(super) bookmarks: bool,
}

/// Who listens has gone, or is cut off.
struct Over;

impl Watch {
    /// Tells what happens after version `from`, for so many seconds.
    pub(super) async fn run(self, from: u64, seconds: Option<u64>, mut sender: Sender<Bytes, io::Error>) {
        let begun = Instant::now();
        let agreed = seconds.map_or(LONGEST, Duration::from_secs).min(LONGEST);
        let (mut changes, mut faults) = (self.shared.changes.subscribe(), self.shared.faults.subscribe());
        let mut known = from;
        loop {
            let (silent, short) = {
                let faults = faults.borrow_and_update();
                (faults.silent, faults.short)
            };
            let end = begun + if silent { LONGEST } else { agreed };
            if short || Instant::now() >= end {
                return;
            }
            match self.tell(&mut known, &mut sender).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(Over) => {
                    sender.abort(io::Error::other("cut on purpose"));
                    return;
                }
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = faults.changed() => {}
                () = sleep(BOOKMARKS.min(end.saturating_duration_since(Instant::now()))) => {}
            }
        }
    }

    /// Tells what is new; false if that was all there will be.
    async fn tell(&self, known: &mut u64, sender: &mut Sender<Bytes, io::Error>) -> Result<bool, Over> {
        let faults = self.shared.faults();
        if faults.silent {
            return Ok(true);
        }
        let (version, events) = {
            let store = self.shared.store();
            (store.version(), store.since(*known, self.resource, &self.selector))
        };
        let Ok(events) = events else {
            let gone = status(410, "Expired", "too old resource version");
            send(sender, line("ERROR", &gone)).await?;
            return Ok(false);
        };
        for (what, object) in events.into_iter().filter(|_| !faults.lossy) {
            let line = line(what, &object);
            if faults.torn {
                send(sender, line[..line.len() / 2].to_owned()).await?;
                return Err(Over);
            }
            if faults.garbage {
                send(sender, "{\"type\": \"ADDED\", \"object\": oops}\n".to_owned()).await?;
                continue;
            }
            for _ in 0..1 + usize::from(faults.twice) {
                send(sender, line.clone()).await?;
            }
        }
        *known = version;
        if self.bookmarks {
            let version = version.to_string();
            let group = self.resource.group();
            let api_version = if group.is_empty() { "v1".to_owned() } else { format!("{group}/v1") };
            let bookmark = json!({
                "kind": self.kind, "apiVersion": api_version, "metadata": { "resourceVersion": version },
            });
            send(sender, line("BOOKMARK", &bookmark)).await?;
        }
        Ok(true)
    }
}

fn line(what: &str, object: &Value) -> String {
    format!("{}\n", json!({ "type": what, "object": object }))
}

async fn send(sender: &mut Sender<Bytes, io::Error>, line: String) -> Result<(), Over> {
    sender.send_data(Bytes::from(line)).await.map_err(|_| Over)
}
