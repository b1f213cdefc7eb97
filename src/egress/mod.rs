//! What leaves this machine: the one HTTP client for addresses that users and the world choose, and the
//! cryptography of the secrets that go along.
//!
//! It knows no database and no graph: `services` stores what is sealed here and says what is sent.
//!
//! **Invariant:** a secret in the clear is in memory only, in a type that wipes itself and does not print.
//! **Invariant:** a connection goes to an address that was checked, not to a name that was.

pub mod address;
pub mod guard;
pub mod keyfile;
pub mod signature;
pub mod vault;
