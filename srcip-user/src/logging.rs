//! What is told on stderr: for people, or as JSON for programs. How much, an agent lets itself be told while
//! it runs.
//!
//! The programs' own log (`aya-log`) comes here, too, with the target `srcip`; the level at which a program
//! is loaded decides what it can say. A filter's targets are beginnings: `srcip` is also `srcip_user`.

use std::{
    fmt, io,
    sync::{Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::LevelFilter,
    layer::SubscriberExt as _,
    reload,
    util::{SubscriberInitExt as _, TryInitError},
};

/// The longest filter; it may come over a socket.
const MAX_FILTER: usize = 1024;

/// What a line of the log looks like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// For whoever has given a command and waits for its end.
    Command,
    /// For whoever reads later: with the time, and where it comes from.
    Service(LogFormat),
}

/// How an agent logs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// An object a line.
    Json,
}

/// Why a filter was not taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{filter:?} is no filter for the log: {problem}; expected a level (error, warn, info, debug, trace) or \
     TARGET=LEVEL, or several with commas, such as warn,srcip_user=debug"
)]
pub struct FilterError {
    filter: String,
    problem: String,
}

/// What is logged, to be changed at any time.
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
    filter: Mutex<String>,
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogControl").field("filter", &self.filter()).finish_non_exhaustive()
    }
}

impl LogControl {
    /// What is logged now.
    pub fn filter(&self) -> String {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Logs what `filter` says from now on; returns the filter as it is then.
    pub fn set_filter(&self, filter: &str) -> Result<String, FilterError> {
        let new = parse(filter)?;
        let mut current = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        self.handle.reload(new).map_err(|error| FilterError::new(filter, error))?;
        filter.trim().clone_into(&mut current);
        Ok(current.clone())
    }
}

#[cfg(test)]
impl LogControl {
    /// Of a log that nobody writes to.
    pub(crate) fn for_test(filter: &str) -> Self {
        prepare(filter, Style::Command, io::sink, false).unwrap().0
    }
}

impl FilterError {
    fn new(filter: &str, problem: impl fmt::Display) -> Self {
        Self { filter: filter.chars().take(MAX_FILTER).collect(), problem: problem.to_string() }
    }
}

/// Starts logging to stderr, in colour if that is wanted. Once in a process.
pub fn start(filter: &str, style: Style, colour: bool) -> anyhow::Result<LogControl> {
    let (control, subscriber) = prepare(filter, style, io::stderr, colour)?;
    subscriber.try_init().map_err(|error: TryInitError| anyhow::anyhow!("cannot start logging: {error}"))?;
    // Of what comes from elsewhere by way of `log`, the filter decides, too, whatever it becomes.
    log::set_max_level(log::LevelFilter::Trace);
    Ok(control)
}

fn prepare<W>(
    filter: &str,
    style: Style,
    writer: W,
    colour: bool,
) -> Result<(LogControl, impl tracing::Subscriber + Send + Sync + 'static), FilterError>
where
    W: for<'a> tracing_subscriber::fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let (layer, handle) = reload::Layer::new(parse(filter)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colour);
    let lines = match style {
        Style::Command => lines.with_target(false).without_time().boxed(),
        Style::Service(LogFormat::Text) => lines.boxed(),
        Style::Service(LogFormat::Json) => lines.json().flatten_event(true).boxed(),
    };
    let control = LogControl { handle, filter: Mutex::new(filter.trim().to_owned()) };
    Ok((control, tracing_subscriber::registry().with(layer).with(lines)))
}

/// A word that is no level would be taken for a target, and all others be silent.
fn parse(filter: &str) -> Result<EnvFilter, FilterError> {
    let failed = |problem: &str| FilterError::new(filter, problem);
    if filter.len() > MAX_FILTER {
        return Err(failed("it is too long"));
    }
    for directive in filter.trim().split(',') {
        let is_level = !directive.is_empty() && directive.parse::<LevelFilter>().is_ok();
        if !is_level && !directive.contains('=') {
            return Err(failed(&format!("{directive:?} is no level")));
        }
    }
    EnvFilter::try_new(filter.trim()).map_err(|error| FilterError::new(filter, error))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What is written, for the test to read.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    /// Runs something with a log of its own.
    fn with_log(filter: &str, style: Style, run: impl FnOnce(&LogControl, &Written)) {
        let written = Written::default();
        let writer = written.clone();
        let (control, subscriber) = prepare(filter, style, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, || run(&control, &written));
    }

    #[test]
    fn the_level_changes_while_it_runs() {
        with_log("warn", Style::Command, |control, written| {
            tracing::info!("unheard");
            assert_eq!(written.take(), "");
            assert_eq!(control.set_filter(" info,aya=trace ").unwrap(), "info,aya=trace");
            tracing::info!(pod = "shop/web", "heard");
            assert_eq!(written.take(), " INFO heard pod=\"shop/web\"\n");
            assert!(!tracing::enabled!(tracing::Level::DEBUG));
            assert!(tracing::enabled!(target: "aya::maps", tracing::Level::TRACE));
            control.set_filter("debug").unwrap();
            assert!(tracing::enabled!(tracing::Level::DEBUG));
            assert_eq!(control.filter(), "debug");
        });
    }

    #[test]
    fn what_is_no_filter_changes_nothing() {
        with_log("warn", Style::Command, |control, _| {
            for bad in ["", "verbose", "info,", "srcip=loud", "=", &"x=info,".repeat(200)] {
                let error = control.set_filter(bad).unwrap_err().to_string();
                assert!(error.contains("warn,srcip_user=debug"), "{bad:?}: {error}");
            }
            assert_eq!(control.filter(), "warn");
        });
    }

    #[test]
    fn json_is_an_object_a_line() {
        with_log("info", Style::Service(LogFormat::Json), |_, written| {
            tracing::warn!(pod = "shop/web", "line\n{}", "\u{1b}[2J");
            let text = written.take();
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            let object: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(object["level"], "WARN");
            assert_eq!(object["pod"], "shop/web");
            assert!(object["timestamp"].is_string() && object["target"].is_string(), "{object}");
        });
    }
}
