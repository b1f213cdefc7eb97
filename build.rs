//! Tells cargo that a new migration is a change: the migrator is compiled in.

fn main() {
    println!("cargo::rerun-if-changed=migrations");
}
