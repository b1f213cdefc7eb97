//! The connecting side: what a server is recognised by.
//!
//! **Invariant:** whatever is pinned, the peer must prove that it holds the key: signatures are always checked.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};

use super::accept::{certificates, read};
use super::{TlsError, provider, unusable};

/// SHA-256 of a public key, as it stands in a certificate (SubjectPublicKeyInfo).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pin([u8; 32]);

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Pin {
    type Err = TlsError;

    /// Reads base64 or hex.
    fn from_str(text: &str) -> Result<Self, TlsError> {
        let text = text.trim();
        let hex = |at: usize| text.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        let bytes = if text.len() == 64 {
            (0..64).step_by(2).map(hex).collect::<Option<Vec<u8>>>()
        } else {
            STANDARD.decode(text).ok()
        };
        let bytes = bytes.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        bytes.map(Self).ok_or(TlsError::BadPin)
    }
}

impl Pin {
    /// The pin of a certificate's key.
    ///
    /// # Errors
    /// It is no certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, TlsError> {
        let parsed = ParsedCertificate::try_from(certificate);
        let parsed = parsed.map_err(|err| unusable("the certificate", err))?;
        Ok(Self(Sha256::digest(parsed.subject_public_key_info()).into()))
    }

    /// The pin of the first certificate of a text.
    ///
    /// # Errors
    /// It holds none.
    pub fn of_pem(pem: &str) -> Result<Self, TlsError> {
        Self::of(&first(pem)?)
    }
}

/// What a server is recognised by. The default is what this machine trusts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// The server's key is one of these; whose name the certificate bears, and since when, is then of no interest.
    pub pins: BTreeSet<Pin>,
    /// The chain leads to one of these. With pins, both must hold; without either, to a root of this machine.
    pub roots: Vec<CertificateDer<'static>>,
    /// It is this certificate and no other.
    pub exactly: Option<CertificateDer<'static>>,
}

impl Trust {
    /// Trusts the server that shows this certificate, the first of a text.
    ///
    /// # Errors
    /// It holds none.
    pub fn exactly(pem: &str) -> Result<Self, TlsError> {
        Ok(Self { exactly: Some(first(pem)?), ..Self::default() })
    }

    /// Adds the certificates of a file.
    ///
    /// # Errors
    /// It cannot be read, or holds none.
    pub fn add_bundle(&mut self, path: &Path) -> Result<(), TlsError> {
        let found = certificates(&read(path)?, &path.display().to_string())?;
        self.roots.extend(found);
        Ok(())
    }

    /// Adds the certificates of a text.
    ///
    /// # Errors
    /// It holds none.
    pub fn add_bundle_pem(&mut self, pem: &str) -> Result<(), TlsError> {
        self.roots.extend(certificates(pem.as_bytes(), "the bundle")?);
        Ok(())
    }

    /// Adds the roots of this machine.
    ///
    /// # Errors
    /// It has none.
    pub fn add_machine_roots(&mut self) -> Result<(), TlsError> {
        let found = rustls_native_certs::load_native_certs().certs;
        if found.is_empty() {
            return Err(TlsError::NoRoots);
        }
        self.roots.extend(found);
        Ok(())
    }

    /// For an HTTP client.
    ///
    /// # Errors
    /// A root cannot be used, or there is nothing to go by.
    pub fn client_config(mut self) -> Result<ClientConfig, TlsError> {
        if self.roots.is_empty() && self.pins.is_empty() && self.exactly.is_none() {
            self.add_machine_roots()?;
        }
        let chain = if self.roots.is_empty() { None } else { Some(chain(self.roots)?) };
        let verifier =
            Verifier { pins: self.pins, chain, exactly: self.exactly, provider: provider() };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|err| unusable("TLS", err))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn first(pem: &str) -> Result<CertificateDer<'static>, TlsError> {
    Ok(certificates(pem.as_bytes(), "the certificate")?.swap_remove(0))
}

fn chain(roots: Vec<CertificateDer<'static>>) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let mut store = RootCertStore::empty();
    // A machine's own roots may hold some that nobody can read any more.
    let (added, _) = store.add_parsable_certificates(roots);
    if added == 0 {
        return Err(unusable("the bundle", "none of its certificates is a root"));
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider());
    verifier.build().map_err(|err| unusable("the bundle", err))
}

#[derive(Debug)]
struct Verifier {
    pins: BTreeSet<Pin>,
    chain: Option<Arc<WebPkiServerVerifier>>,
    exactly: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let refused = || Err(CertificateError::ApplicationVerificationFailure.into());
        if self.exactly.as_ref().is_some_and(|expected| expected != end_entity) {
            return refused();
        }
        if !self.pins.is_empty() {
            let pin = Pin::of(end_entity).map_err(|_| CertificateError::BadEncoding)?;
            if !self.pins.contains(&pin) {
                return refused();
            }
        }
        match &self.chain {
            Some(chain) => {
                chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            }
            None => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::clock::{Clock, SystemClock};
    use crate::tls::accept::Acceptor;
    use crate::tls::own::Own;

    fn own(name: &str) -> Own {
        let now: chrono::DateTime<Utc> = SystemClock.now();
        Own::make(&[name.to_owned()], now).unwrap()
    }

    /// Whether a client with this trust finishes a handshake with a server that shows `shown`.
    async fn accepts(trust: Trust, shown: &Own, name: &'static str) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::from_pem(&shown.certificate_pem, &shown.key_pem).unwrap();
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let _ = stream.write_all(b"x").await;
                let _ = stream.shutdown().await;
            }
        };
        let client = async {
            let connector = TlsConnector::from(Arc::new(trust.client_config().unwrap()));
            let stream = TcpStream::connect(address).await.unwrap();
            let Ok(mut stream) =
                connector.connect(ServerName::try_from(name).unwrap(), stream).await
            else {
                return false;
            };
            let mut byte = [0];
            stream.read_exact(&mut byte).await.is_ok()
        };
        tokio::join!(server, client).1
    }

    #[tokio::test]
    async fn a_server_is_recognised_by_its_key_its_certificate_or_its_chain() {
        let (shown, other) = (own("localhost"), own("localhost"));
        let pin = |own: &Own| Trust {
            pins: BTreeSet::from([Pin::of_pem(&own.certificate_pem).unwrap()]),
            ..Trust::default()
        };
        assert!(accepts(pin(&shown), &shown, "elsewhere.example").await);
        assert!(!accepts(pin(&other), &shown, "localhost").await);
        let exactly = |own: &Own| Trust::exactly(&own.certificate_pem).unwrap();
        assert!(accepts(exactly(&shown), &shown, "elsewhere.example").await);
        assert!(!accepts(exactly(&other), &shown, "localhost").await);
        let bundle = |own: &Own| {
            let mut trust = Trust::default();
            trust.add_bundle_pem(&own.certificate_pem).unwrap();
            trust
        };
        assert!(accepts(bundle(&shown), &shown, "localhost").await);
        assert!(!accepts(bundle(&shown), &shown, "elsewhere.example").await);
        assert!(!accepts(bundle(&other), &shown, "localhost").await);
        let both = Trust { roots: bundle(&shown).roots, ..pin(&other) };
        assert!(!accepts(both, &shown, "localhost").await);
    }

    #[test]
    fn pins_are_read_as_base64_and_hex() {
        let pin = Pin::of_pem(&own("localhost").certificate_pem).unwrap();
        assert_eq!(pin.to_string().parse::<Pin>().unwrap(), pin);
        let hex: String = pin.0.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(hex.parse::<Pin>().unwrap(), pin);
        for wrong in ["", "abc", &hex[1..], &"é".repeat(32)] {
            assert!(wrong.parse::<Pin>().is_err(), "{wrong}");
        }
    }
}
