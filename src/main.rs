//! The `cynai` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    cynai::cli::main()
}
