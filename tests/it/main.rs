//! The one integration binary: the parts of Cynai as their users meet them.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod crash_points;
mod crash_random;
mod support;
mod worker;
