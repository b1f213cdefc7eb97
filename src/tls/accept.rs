//! The accepting side: shows a certificate, and a renewed one as soon as it is there.
//!
//! **Invariant:** a certificate that cannot be used never replaces one that can.
//! **Invariant:** a client that does not finish its handshake is cut off after [`HANDSHAKE_PATIENCE`].

use std::fs::{File, Metadata};
use std::io;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{MAX_PEM_BYTES, TlsError, certificate_pem, provider, unusable};

/// How long a client may take for its handshake.
pub const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// How long the files are not looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Makes TLS connections of TCP connections. Clones share everything.
#[derive(Clone)]
pub struct Acceptor(Arc<Shared>);

struct Shared {
    tls: TlsAcceptor,
    shown: Arc<Shown>,
    files: Option<Files>,
}

/// The certificate that new connections are shown.
#[derive(Debug)]
struct Shown(RwLock<Arc<CertifiedKey>>);

/// Where the certificate comes from, and how the files were when they were last read.
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    seen: Mutex<(Instant, [Stamp; 2])>,
}

/// What changes when a file does: device, inode, size and time of the last change.
type Stamp = (u64, u64, u64, i64, i64);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor(..)")
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.get())
    }
}

impl Shown {
    fn get(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn set(&self, key: CertifiedKey) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
    }
}

impl Acceptor {
    /// Shows what stands in two PEM files, read again when they change: a chain, its own certificate first, and its key.
    ///
    /// # Errors
    /// A file cannot be read or used, or the key is not the certificate's.
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let stamps = [stamp(certificate), stamp(key)];
        let shown = read_pair(certificate, key)?;
        let seen = Mutex::new((Instant::now(), stamps));
        Ok(Self::new(shown, Some(Files { certificate: certificate.into(), key: key.into(), seen })))
    }

    /// Shows a certificate that is at hand, until [`Acceptor::replace`].
    ///
    /// # Errors
    /// It cannot be used, or the key is not the certificate's.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, TlsError> {
        let shown = pair(certificate.as_bytes(), "the certificate", key.as_bytes(), "the key")?;
        Ok(Self::new(shown, None))
    }

    fn new(shown: CertifiedKey, files: Option<Files>) -> Self {
        let shown = Arc::new(Shown(RwLock::new(Arc::new(shown))));
        let resolver = Arc::<Shown>::clone(&shown);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("ring speaks both versions of TLS")
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self(Arc::new(Shared { tls: TlsAcceptor::from(Arc::new(config)), shown, files }))
    }

    /// Shows another certificate to connections from now on.
    ///
    /// # Errors
    /// See [`Acceptor::from_pem`]; the old one stays.
    pub fn replace(&self, certificate: &str, key: &str) -> Result<(), TlsError> {
        self.0.shown.set(pair(
            certificate.as_bytes(),
            "the certificate",
            key.as_bytes(),
            "the key",
        )?);
        Ok(())
    }

    /// The certificate that is shown now, without its chain.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        self.refresh();
        self.0.shown.get().cert.first().map(certificate_pem).unwrap_or_default()
    }

    /// The handshake.
    ///
    /// # Errors
    /// It failed, or took too long.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.refresh();
        let handshake = tokio::time::timeout(HANDSHAKE_PATIENCE, self.0.tls.accept(stream));
        handshake.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Looks whether the files have changed, at most once a second. Two small files: no reason to leave the thread.
    fn refresh(&self) {
        let Some(files) = &self.0.files else { return };
        let mut seen = files.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.0.elapsed() < LOOK_AGAIN {
            return;
        }
        seen.0 = Instant::now();
        // Looked at before they are read: a change while they are read is another change.
        let stamps = [stamp(&files.certificate), stamp(&files.key)];
        if stamps == seen.1 {
            return;
        }
        seen.1 = stamps;
        drop(seen);
        match read_pair(&files.certificate, &files.key) {
            Ok(key) => {
                self.0.shown.set(key);
                tracing::info!(certificate = %files.certificate.display(), "the renewed certificate is shown");
            }
            Err(err) => tracing::error!(
                error = &err as &dyn std::error::Error,
                "the changed certificate cannot be used; the one before is still shown"
            ),
        }
    }
}

fn stamp(path: &Path) -> Stamp {
    let of =
        |file: Metadata| (file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec());
    std::fs::metadata(path).map(of).unwrap_or_default()
}

fn read_pair(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let (chain, secret) = (read(certificate)?, read(key)?);
    let [certificate, key] = [certificate, key].map(|path| path.display().to_string());
    pair(&chain, &certificate, &secret, &key)
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        let reason = format!("it is over {MAX_PEM_BYTES} bytes");
        return Err(unusable(&path.display().to_string(), reason));
    }
    Ok(bytes)
}

/// All certificates of a text.
pub(super) fn certificates(
    pem: &[u8],
    place: &str,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|err| unusable(place, err))?;
    if found.is_empty() {
        return Err(TlsError::Missing { place: place.to_owned(), expected: "certificate" });
    }
    Ok(found)
}

fn pair(chain: &[u8], place: &str, key: &[u8], key_place: &str) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(chain, place)?;
    let missing = TlsError::Missing { place: key_place.to_owned(), expected: "private key" };
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| missing)?;
    let signing = provider().key_provider.load_private_key(key);
    let pair = CertifiedKey::new(chain, signing.map_err(|err| unusable(key_place, err))?);
    let mismatch =
        || unusable(key_place, format!("it is not the key of the certificate in {place}"));
    match pair.keys_match() {
        Ok(()) => Ok(pair),
        Err(rustls::Error::InconsistentKeys(_)) => Err(mismatch()),
        Err(err) => Err(unusable(place, err)),
    }
}

#[cfg(test)]
mod tests {
    use chrono::{TimeZone, Utc};

    use super::*;
    use crate::tls::own::Own;

    fn own() -> Own {
        let now = Utc.with_ymd_and_hms(2026, 11, 1, 0, 0, 0).unwrap();
        Own::make(&["localhost".to_owned()], now).unwrap()
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_its_place() {
        let (one, other) = (own(), own());
        let check = |certificate: &str, key: &str, expected: &str| {
            let err = Acceptor::from_pem(certificate, key).unwrap_err().to_string();
            assert!(err.contains(expected), "{err}");
        };
        check("", &one.key_pem, "the certificate holds no certificate in PEM form");
        check(&one.certificate_pem, "x", "the key holds no private key");
        check(&one.certificate_pem, &other.key_pem, "it is not the key of the certificate");
        let shown = Acceptor::from_pem(&one.certificate_pem, &one.key_pem).unwrap();
        assert_eq!(shown.certificate_pem(), one.certificate_pem.replace("\r\n", "\n"));
    }

    #[test]
    fn files_are_read_again_and_a_broken_pair_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let [cert, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
        let (one, other) = (own(), own());
        std::fs::write(&cert, &one.certificate_pem).unwrap();
        std::fs::write(&key, &one.key_pem).unwrap();
        let acceptor = Acceptor::from_files(&cert, &key).unwrap();
        let pem = |own: &Own| own.certificate_pem.replace("\r\n", "\n");
        let forget = || {
            let Some(files) = &acceptor.0.files else { return };
            files.seen.lock().unwrap().0 -= LOOK_AGAIN;
        };
        // Half of a renewal: a pair that does not match.
        std::fs::write(&cert, &other.certificate_pem).unwrap();
        forget();
        assert_eq!(acceptor.certificate_pem(), pem(&one));
        std::fs::write(&key, &other.key_pem).unwrap();
        forget();
        assert_eq!(acceptor.certificate_pem(), pem(&other));
    }
}
