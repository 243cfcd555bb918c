//! The command line: one file per verb. Data goes to stdout, everything else to stderr.

mod agent;
mod attach;
mod audit;
mod cleanup;
mod detach;
mod doctor;
mod explain;
mod export;
mod loglevel;
mod observe;
mod output;
mod status;
mod top;

use std::{io, path::PathBuf, process::ExitCode};

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::{
    agent::protocol::DEFAULT_SOCKET,
    dataplane::{Dataplane, error::chain, pins::DEFAULT_PIN_PATH, record::TcHook},
    logging::{self, Style},
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
    Agent(agent::Agent),
    #[command(name = "loglevel")]
    LogLevel(loglevel::LogLevel),
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

/// Where the agent of this node is asked.
#[derive(Debug, Args)]
struct SocketArg {
    /// The agent's socket.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "SRCIP_SOCKET")]
    socket: PathBuf,
}

/// How programs are attached to devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum TcHookArg {
    /// tcx from Linux 6.6 on, else clsact.
    Auto,
    Tcx,
    Clsact,
}

impl TcHookArg {
    fn hook(self) -> Option<TcHook> {
        match self {
            Self::Auto => None,
            Self::Tcx => Some(TcHook::Tcx),
            Self::Clsact => Some(TcHook::Clsact),
        }
    }
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
    let colour = output::colour(&io::stderr());
    let (filter, style) = cli.logging();
    let log = match logging::start(&filter, style, colour) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
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
        Verb::Agent(args) => args.run(&dataplane, log),
        Verb::LogLevel(args) => args.run(),
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

impl Cli {
    /// What is logged, and how.
    fn logging(&self) -> (String, Style) {
        let (filter, style) = match &self.verb {
            Verb::Agent(agent) => agent.logging(),
            _ => ("warn", Style::Command),
        };
        // Once for what srcip does (`srcip` is the programs' own log), twice for what aya does for it.
        let filter = match self.global.verbose {
            0 => filter.to_owned(),
            1 => format!("{filter},srcip_user=debug,srcip=debug"),
            2 => "debug".to_owned(),
            _ => "trace".to_owned(),
        };
        (filter, style)
    }
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
    fn verbose_says_more_whoever_logs() {
        let filter =
            |arguments: &[&str]| Cli::try_parse_from([&["srcip"], arguments].concat()).unwrap().logging().0;
        let detail = "srcip_user=debug,srcip=debug";
        assert_eq!(filter(&["status"]), "warn");
        assert_eq!(filter(&["status", "-v"]), format!("warn,{detail}"));
        let agent = ["agent", "--manifests", "/x", "--log", "error"];
        assert_eq!(filter(&agent), "error");
        assert_eq!(filter(&[&agent[..], &["-v"]].concat()), format!("error,{detail}"));
        for verb in [&agent[..], &["status"]] {
            assert_eq!(filter(&[verb, &["-vv"]].concat()), "debug");
            assert_eq!(filter(&[verb, &["-v", "-vv"]].concat()), "trace");
        }
    }

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
            "explain",
            "agent",
            "loglevel",
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
