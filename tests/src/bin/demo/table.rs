//! Both set-ups side by side, and whether they show what they should.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use crate::screen::Screen;

/// Whose address a view tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whose {
    /// The client's, which this witness knows in either set-up.
    Known,
    /// The client's, which this witness knows only with srcip.
    Client,
    /// The pod's: where the client connected to.
    Pod,
}

/// One view of a connection.
#[derive(Clone, Debug)]
pub struct View {
    /// What it is called.
    pub name: String,
    /// What it says.
    pub shown: String,
    /// The address in that.
    pub ip: IpAddr,
    /// The address that it should be.
    pub expected: IpAddr,
    /// Whose that is.
    pub whose: Whose,
}

impl View {
    fn is_right(&self) -> bool {
        self.ip == self.expected
    }

    /// One word for it.
    fn mark(&self) -> &'static str {
        match (self.whose, self.is_right()) {
            (Whose::Pod, true) => "-",
            (Whose::Pod, false) => "wrong",
            (_, true) => "kept",
            (_, false) => "lost",
        }
    }

    /// Address and word, padded to columns.
    fn cell(&self, screen: Screen, width: usize) -> String {
        let text = format!("{:<width$}  {:<5}", self.shown, self.mark());
        match (self.whose, self.is_right()) {
            (Whose::Pod, true) => text,
            (_, true) => screen.good(&text),
            (_, false) => screen.bad(&text),
        }
    }
}

/// Prints what was seen before and after, side by side; nothing where a set-up could not be looked at.
pub fn print(screen: Screen, rows: &[(Option<View>, View)]) -> Result<()> {
    let none = "(not shown)";
    let names = rows.iter().map(|(_, view)| view.name.len()).max().unwrap_or_default();
    let befores = rows.iter().flat_map(|(before, _)| before).map(|view| view.shown.len());
    let befores = befores.max().unwrap_or_default().max(none.len());
    let afters = rows.iter().map(|(_, view)| view.shown.len()).max().unwrap_or_default();
    let header = format!("{:<names$}  {:<width$}  AFTER", "VIEW", "BEFORE", width = befores + 7);
    screen.show(format_args!("{}", screen.bold(&header)))?;
    for (before, after) in rows {
        let before = before.as_ref().map_or_else(
            || format!("{none:<width$}", width = befores + 7),
            |view| view.cell(screen, befores),
        );
        let line = format!("{:<names$}  {before}  {}", after.name, after.cell(screen, afters));
        screen.show(format_args!("{}", line.trim_end()))?;
    }
    Ok(())
}

/// Fails with the view that does not show what it should: the client's address everywhere after, and
/// not before where srcip is what keeps it, or else the comparison means nothing.
pub fn verdict(before: &[View], after: &[View]) -> Result<()> {
    for view in before {
        ensure!(
            view.whose != Whose::Client || !view.is_right(),
            "before: {} already shows the client's address {}, so that there is nothing to compare with",
            view.name,
            view.expected
        );
    }
    for view in after {
        let whose = if view.whose == Whose::Pod { "pod's" } else { "client's" };
        ensure!(
            view.is_right(),
            "after: {} shows {}, not the {whose} address {}",
            view.name,
            view.ip,
            view.expected
        );
    }
    Ok(())
}
