//! `driver`.
