//! `store`.
pub mod embedded;
