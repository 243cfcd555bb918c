//! `srcip top` on a pseudo-terminal.

use std::{
    io::ErrorKind,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    pty::{Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{Termios, tcgetattr},
    },
    unistd::Pid,
};
use srcip_tests::{
    Family, PATIENCE, client,
    observe::{programs, wait_for_programs},
    peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

/// `srcip top`, and the screen it draws on.
struct Top {
    master: Option<OwnedFd>,
    slave: Option<OwnedFd>,
    before: Termios,
    child: Child,
    screen: vt100::Parser,
}

impl Top {
    fn start(scenario: &Scenario, size: (u16, u16), no_color: bool) -> Self {
        let (rows, columns) = size;
        let winsize = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&winsize, None).unwrap();
        fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        // Else the window could not be closed.
        fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        let arguments = format!("top --cgroup {}", scenario.world.cgroup().display());
        let mut command = scenario.srcip.command(&arguments);
        let end = || pty.slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "xterm-256color");
        if no_color {
            command.env("NO_COLOR", "1");
        } else {
            command.env_remove("NO_COLOR");
        }
        // SAFETY: only system calls on a descriptor that is open, no allocation.
        unsafe {
            command.pre_exec(|| {
                // Its terminal, so that it is told when that goes.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let before = tcgetattr(&pty.slave).unwrap();
        Self {
            child: command.spawn().unwrap(),
            master: Some(pty.master),
            slave: Some(pty.slave),
            before,
            screen: vt100::Parser::new(rows, columns, 0),
        }
    }

    /// Takes in what has been drawn.
    fn pump(&mut self) {
        let Some(master) = &self.master else { return };
        let mut buffer = [0; 65536];
        loop {
            match nix::unistd::read(master, &mut buffer).map_err(std::io::Error::from) {
                Ok(0) => return,
                Ok(count) => self.screen.process(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn contents(&self) -> String {
        self.screen.screen().contents()
    }

    /// Waits until a line has all of these.
    fn wait_for(&mut self, parts: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.pump();
            let contents = self.contents();
            let line = contents.lines().find(|line| parts.iter().all(|part| line.contains(part)));
            if let Some(line) = line {
                return line.to_owned();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(Instant::now() < deadline && ended.is_none(), "no {parts:?} ({ended:?}):\n{contents}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, keys: &str) {
        let master = self.master.as_ref().unwrap();
        assert_eq!(nix::unistd::write(master, keys.as_bytes()).unwrap(), keys.len());
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        let winsize = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // First: what is drawn for the old size by then is drawn anew.
        self.pump();
        self.screen.screen_mut().set_size(rows, columns);
        let master = self.master.as_ref().unwrap();
        // SAFETY: the descriptor is open, and the kernel reads one `winsize`.
        let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const winsize) };
        assert_eq!(result, 0);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.pump();
            if let Some(status) = self.child.try_wait().unwrap() {
                self.pump();
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.contents());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether the terminal has other settings than at first.
    fn is_changed(&self) -> bool {
        tcgetattr(self.slave.as_ref().unwrap()).unwrap() != self.before
    }

    /// The terminal is as it was.
    fn assert_restored(&self) {
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "{}", self.contents());
        assert!(!self.is_changed());
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const USUAL: (u16, u16) = (24, 80);

crate::engines!(clients_and_workloads);

fn clients_and_workloads(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    scenario.attach("--name web");
    // A pod whose proxy hides its clients.
    let lossy = scenario.world.host("lossy").unwrap();
    let _application = peer::application(&lossy, &["[::]:8000"]).unwrap();
    let _proxy = Proxy::start_with(&lossy, Kind::Haproxy, |config| {
        config.lines().filter(|line| !line.contains("usesrc")).map(|line| format!("{line}\n")).collect()
    })
    .unwrap();
    scenario.srcip.attach(&lossy, &format!("{} --name lossy", engine.option())).unwrap();
    let programs_before = programs(scenario.world.cgroup()).unwrap();

    let mut top = Top::start(&scenario, USUAL, false);
    top.wait_for(&["No connection into a pod has opened yet"]);
    assert!(top.screen.screen().alternate_screen() && top.screen.screen().hide_cursor());
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    let [v4, v6] = Family::BOTH.map(|family| scenario.client.address(family).to_string());
    top.wait_for(&[&v4, "preserved"]);
    top.wait_for(&[&v6, "preserved"]);
    top.wait_for(&["srcip top", "clients 2", "workloads 1", "events lost 0"]);
    top.wait_for(&["total 2", "preserved 2", "lost 0"]);
    top.wait_for(&["CLIENT", "NEW/sv", "ORIGIN", "APP SEES"]);
    // An open connection, and then its bytes.
    let mut stream = client::connect(&scenario.client, scenario.pod.socket(Family::V4, PORT)).unwrap();
    client::ask(&mut stream).unwrap();
    top.wait_for(&["open 1", "total 3"]);
    drop(stream);
    top.wait_for(&["open 0", "total 3"]);

    // What is lost says so, in red as well.
    client::ask_once(&scenario.client, lossy.socket(Family::V4, PORT)).unwrap();
    top.wait_for(&["total 4", "preserved 3", "lost 1"]);
    let own = lossy.address(Family::V4).to_string();
    top.wait_for(&[&v4, "lost", &own]);
    let red = |top: &Top| {
        let screen = top.screen.screen();
        let cells = (0..24).flat_map(|row| (0..80).map(move |column| (row, column)));
        cells
            .filter_map(|(row, column)| screen.cell(row, column))
            .any(|cell| cell.fgcolor() == vt100::Color::Idx(1) || cell.fgcolor() == vt100::Color::Idx(9))
    };
    assert!(red(&top));

    top.press("\t");
    top.wait_for(&["[by workload]"]);
    top.wait_for(&["web", "preserved", "the client"]);
    top.wait_for(&["lossy", "lost", &own]);
    top.press("s");
    top.wait_for(&["order TOTALv"]);
    top.press("r");
    top.wait_for(&["order TOTAL^"]);
    top.press("/loss\r");
    top.wait_for(&["filter loss"]);
    top.wait_for(&["1/1"]);
    assert!(!top.contents().contains("\nweb "), "{}", top.contents());
    top.press("\x1b");
    top.wait_for(&["1/2"]);
    top.press("?");
    top.wait_for(&["p Space", "pause"]);
    top.press("?");
    for (rows, columns) in [(5, 20), (10, 40), (30, 120), (24, 80)] {
        top.resize(rows, columns);
        top.wait_for(&["WORKLOAD"]);
    }
    // A key that comes with a new size is not overlooked.
    for i in 0..20 {
        top.resize(24, 79 + i % 2);
        top.press("/");
        top.wait_for(&["/_", "Enter accepts"]);
        top.resize(24, 80 - i % 2);
        top.press("\x1b");
        top.wait_for(&["q quit"]);
    }
    top.press("q");
    assert_eq!(top.wait().code(), Some(0));
    top.assert_restored();
    wait_for_programs(scenario.world.cgroup(), programs_before).unwrap();
}

/// However it ends, the terminal is as it was, and no program stays.
#[test]
fn endings() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let cgroup = scenario.world.cgroup();
    let start = || {
        let mut top = Top::start(&scenario, USUAL, true);
        top.wait_for(&["q quit"]);
        assert_eq!(programs(cgroup).unwrap(), 1);
        assert!(top.is_changed());
        top
    };
    for keys in ["q", "\x03", "\x1b"] {
        let mut top = start();
        top.press(keys);
        assert_eq!(top.wait().code(), Some(0), "{keys:?}");
        top.assert_restored();
        wait_for_programs(cgroup, 0).unwrap();
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut top = start();
        top.signal(signal);
        assert_eq!(top.wait().code(), Some(0), "{signal}");
        top.assert_restored();
        wait_for_programs(cgroup, 0).unwrap();
    }
    // The window is closed: there is nothing any more to write to, not even an error.
    let mut top = start();
    drop(top.slave.take());
    drop(top.master.take());
    assert_eq!(top.wait().code(), Some(0));
    wait_for_programs(cgroup, 0).unwrap();
    // By force: nothing to be done for the terminal, but the program goes.
    let mut top = start();
    top.signal(Signal::SIGKILL);
    top.wait();
    wait_for_programs(cgroup, 0).unwrap();
}

#[test]
fn without_a_terminal() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let output = scenario.srcip.output("top").unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["standard output is not a terminal", "`srcip observe -f`"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(output.stdout.is_empty());
}
