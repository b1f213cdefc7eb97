//! Users and API tokens.

/// Tokens that were verified a moment ago.
#[derive(Debug, Default)]
pub struct TokenCache;
