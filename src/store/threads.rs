//! `threads`.
