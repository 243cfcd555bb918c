//! The CNI plugin as the runtime calls it.

fn main() -> std::process::ExitCode {
    srcip_user::cni::plugin::main()
}
