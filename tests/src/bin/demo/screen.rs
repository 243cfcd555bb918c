//! Output: what is shown goes to stdout, in colour on a terminal; how far things are goes to stderr.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
    net::IpAddr,
};

/// Where the demonstration is shown.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    colour: bool,
}

impl Screen {
    /// Coloured only on a terminal, and not if `NO_COLOR` is set (<https://no-color.org>).
    pub fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colour: io::stdout().is_terminal() && !unwanted }
    }

    /// Prints a line of what is shown.
    pub fn show(self, line: fmt::Arguments<'_>) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        writeln!(stdout, "{line}")?;
        stdout.flush()
    }

    /// Tells how far things are. That nobody reads it is no reason to stop.
    pub fn progress(self, line: fmt::Arguments<'_>) {
        let _ = writeln!(io::stderr(), "{line}");
    }

    /// The client's address.
    pub fn good(self, text: &str) -> String {
        self.paint(text, "32")
    }

    /// The address that hides it.
    pub fn bad(self, text: &str) -> String {
        self.paint(text, "31")
    }

    /// Headings.
    pub fn bold(self, text: &str) -> String {
        self.paint(text, "1")
    }

    /// A text with the client's address and the one that hides it in their colours.
    pub fn highlight(self, text: &str, client: IpAddr, hiding: IpAddr) -> String {
        let [client, hiding] = [client, hiding].map(|ip| ip.to_string());
        text.replace(&client, &self.good(&client)).replace(&hiding, &self.bad(&hiding))
    }

    fn paint(self, text: &str, code: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
