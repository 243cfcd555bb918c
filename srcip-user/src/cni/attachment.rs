//! What the runtime calls an attachment: a container's interface on a network.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// Runtimes use 64 characters; the specification has no limit.
const MAX_CONTAINER_ID: usize = 256;
/// `IFNAMSIZ` without the byte that ends it.
const MAX_IFNAME: usize = 15;

/// Tells a sandbox from every other on this node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(Arc<str>);

/// The interface's name within the sandbox.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName(Arc<str>);

/// An interface of a sandbox, as the runtime names it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: ContainerId,
    /// The interface.
    pub ifname: IfName,
}

/// Why a text is no [`ContainerId`] or [`IfName`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct InvalidName(&'static str);

impl ContainerId {
    /// Checks it as the specification has it.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        let valid = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        (starts_well && text.len() <= MAX_CONTAINER_ID && text.chars().all(valid))
            .then(|| Self(text.into()))
            .ok_or(InvalidName("a container's ID has 1 to 256 letters, digits or any of _ . -, and starts with one of the first two"))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl IfName {
    /// Checks it as the kernel does.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        let valid = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
        let is_length = (1..=MAX_IFNAME).contains(&text.len());
        (is_length && text.chars().all(valid) && text != "." && text != "..")
            .then(|| Self(text.into()))
            .ok_or(InvalidName("an interface's name has 1 to 15 characters, without / and :"))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! text {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }
    };
}

text!(ContainerId);
text!(IfName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_runtimes_use_and_names_that_attack() {
        for good in ["a", "0f3c", &"f".repeat(64), "cnitool-77383ca0a0715733ca6f", "a_b.c-d"] {
            assert_eq!(ContainerId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".", "../x", "a/b", "a b", "a\n", "ä", &"f".repeat(257)] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["eth0", "net1", "veth0.12@", "a"] {
            assert_eq!(IfName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "a:0", "a b", "a\0", "sixteen-letters!"] {
            assert!(IfName::new(bad).is_err(), "{bad:?}");
        }
    }
}
