//! The one integration binary: the parts of Cynai as their users meet them, a database of its own for
//! each test that needs one.

mod crash_points;
mod support;
mod worker;
