//! The command line: one file per verb. Data goes to stdout, everything else to stderr.

mod attach;
mod audit;
mod cleanup;
mod detach;
mod doctor;
mod explain;
mod export;
mod observe;
mod output;
mod status;
mod top;

use std::{io, path::PathBuf, process::ExitCode};

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::{
    dataplane::{Dataplane, error::chain, pins::DEFAULT_PIN_PATH},
    netns::{Netns, NetnsError},
};

/// Keeps the client's IP address visible to applications in a service mesh.
///
/// srcip hands a pod's inbound connections to its proxy with eBPF, packets unchanged, and brings the
/// application's answers back to the proxy when that connects with the client's address. No NAT, no
/// iptables rule, no conntrack entry, and nothing that runs per packet.
#[derive(Debug, Parser)]
#[command(name = "srcip", version, infer_subcommands = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// Where this instance's maps and links are pinned. Another path is another instance, and the two
    /// do not know of each other.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_PIN_PATH, env = "SRCIP_PIN_PATH")]
    pin_path: PathBuf,
    /// Say more on stderr; twice for even more.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Attach(attach::Attach),
    Detach(detach::Detach),
    Status(status::StatusArgs),
    // No text here: it would take the place of the longer one that these have themselves.
    Observe(observe::Observe),
    Top(top::Top),
    Export(export::Export),
    Audit(audit::AuditArgs),
    Explain(explain::ExplainArgs),
    Doctor(doctor::DoctorArgs),
    Cleanup(cleanup::Cleanup),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page, all verbs included (`srcip man | man -l -`).
    Man,
    /// Print the version.
    Version,
}

/// The network namespace of a pod.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct NetnsArg {
    /// The pod's network namespace: /run/netns/NAME or /proc/PID/ns/net.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// A process in the pod.
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
}

impl NetnsArg {
    fn open(&self) -> Result<Netns, NetnsError> {
        match (&self.netns, self.pid) {
            (Some(path), _) => Netns::open(path),
            (None, Some(pid)) => Netns::of_process(pid),
            (None, None) => unreachable!("clap requires one of them"),
        }
    }
}

/// Parses the arguments, does what they say, and tells the exit code: 0 done, 1 failed, 2 misused;
/// `doctor` has its own.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    let dataplane = Dataplane::new(cli.global.pin_path);
    let result = match cli.verb {
        Verb::Attach(args) => args.run(&dataplane),
        Verb::Detach(args) => args.run(&dataplane),
        Verb::Status(args) => args.run(&dataplane),
        Verb::Observe(args) => args.run(&dataplane),
        Verb::Top(args) => args.run(&dataplane),
        Verb::Export(args) => args.run(&dataplane),
        Verb::Audit(args) => match args.run(&dataplane) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Verb::Explain(args) => args.run(&dataplane),
        Verb::Doctor(args) => return args.run(),
        Verb::Cleanup(args) => args.run(&dataplane),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "srcip", &mut script);
            output::print(&script).map_err(Into::into)
        }
        Verb::Man => manual().and_then(|page| output::print(&page)).map_err(Into::into),
        Verb::Version => {
            output::print(format!("srcip {}\n", env!("CARGO_PKG_VERSION")).as_bytes()).map_err(Into::into)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn start_logging(verbose: u8) {
    // Once for what srcip does (`srcip` is the programs' own log), twice for what aya does for it.
    let filter = match verbose {
        0 => "warn",
        1 => "warn,srcip_user=debug,srcip=debug",
        2 => "debug",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(output::colour(&io::stderr()))
        .with_env_filter(EnvFilter::new(filter))
        .with_target(false)
        .without_time()
        .init();
}

/// One page for the command and all of its verbs.
fn manual() -> io::Result<Vec<u8>> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    for verb in command.get_subcommands().filter(|verb| verb.get_name() != "help") {
        let man = clap_mangen::Man::new(verb.clone());
        let title = verb.get_bin_name().unwrap_or_else(|| verb.get_name()).to_uppercase();
        page.extend_from_slice(format!(".SH \"{title}\"\n").as_bytes());
        let mut section = Vec::new();
        man.render_description_section(&mut section)?;
        man.render_synopsis_section(&mut section)?;
        man.render_options_section(&mut section)?;
        // Its sections become subsections of this page's.
        let section = String::from_utf8_lossy(&section).replace("\n.SH ", "\n.SS ");
        page.extend_from_slice(
            section.strip_prefix(".SH ").map_or(section.clone(), |s| format!(".SS {s}")).as_bytes(),
        );
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_manual_covers_every_verb() {
        let page = String::from_utf8(manual().unwrap()).unwrap();
        for verb in [
            "attach",
            "detach",
            "status",
            "observe",
            "top",
            "export",
            "audit",
            "doctor",
            "cleanup",
            "completions",
            "man",
            "version",
        ] {
            assert!(page.contains(&format!(".SH \"SRCIP {}\"", verb.to_uppercase())), "{verb}");
        }
        assert!(page.contains("proxy\\-port"));
    }
}
