//! `services`.
