//! The `srcip` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    srcip_user::cli::main()
}
