//! `tls`: both sides of a TLS connection: certificates that are shown, and what others are recognised by.
//!
//! The server and the workers' agents share it. Nothing here listens, connects or writes files: it gives an
//! acceptor to whoever has a connection, and a client configuration to whoever makes one.
//!
//! **Invariant:** the one provider of cryptography is ring, named wherever rustls asks for one.
//! **Invariant:** no private key is shown by `Debug`.

pub mod accept;
pub mod own;
pub mod trust;

use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;

/// Bytes of a file of certificates or of a key.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("could not read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file or a text does not hold what it should.
    #[error("{place} holds no {expected} in PEM form (`-----BEGIN ...`)")]
    Missing {
        /// Where it was looked for.
        place: String,
        /// What was looked for.
        expected: &'static str,
    },
    /// It is there and cannot be used.
    #[error("{place} cannot be used: {reason}")]
    Unusable {
        /// Where it is.
        place: String,
        /// Why.
        reason: String,
    },
    /// A pin has not the form of one.
    #[error(
        "a pin is the SHA-256 of a public key (SubjectPublicKeyInfo): 44 characters of base64 or 64 of hex"
    )]
    BadPin,
    /// The machine has no certificates that others are recognised by.
    #[error("this machine has no root certificates; install ca-certificates, or name a bundle")]
    NoRoots,
}

fn unusable(place: &str, reason: impl std::fmt::Display) -> TlsError {
    TlsError::Unusable { place: place.to_owned(), reason: reason.to_string() }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A certificate as text.
#[must_use]
pub fn certificate_pem(certificate: &CertificateDer<'_>) -> String {
    let text = STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.extend(line.iter().map(|byte| char::from(*byte)));
        pem.push('\n');
    }
    pem + "-----END CERTIFICATE-----\n"
}
