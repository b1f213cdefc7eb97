//! A certificate that a program makes for itself, for peers that were told which one to expect.

use chrono::{DateTime, Datelike, TimeDelta, Utc};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, date_time_ymd};
use serde::{Deserialize, Serialize};

use super::{TlsError, unusable};

/// How long a certificate is good.
const LIFE: TimeDelta = TimeDelta::days(365);
/// How long before its end it is made anew.
const RENEW_BEFORE: TimeDelta = TimeDelta::days(30);

/// A self-signed certificate with its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Own {
    /// The names and addresses that it is for.
    pub names: Vec<String>,
    /// Its end.
    pub not_after: DateTime<Utc>,
    /// The certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl std::fmt::Debug for Own {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { names, not_after, .. } = self;
        f.debug_struct("Own").field("names", names).field("not_after", not_after).finish()
    }
}

impl Own {
    /// Makes one for these names and addresses. It is good for a year, from the day before `now`.
    ///
    /// # Errors
    /// A name cannot stand in a certificate.
    pub fn make(names: &[String], now: DateTime<Utc>) -> Result<Self, TlsError> {
        let failed = |err: rcgen::Error| unusable("a certificate's name", err);
        let mut params = CertificateParams::new(names).map_err(failed)?;
        let not_after = now + LIFE;
        // Peers whose clock is a little behind must be able to use it at once.
        let [begin, end] = [now - TimeDelta::days(1), not_after].map(|at| {
            let part = |number: u32| u8::try_from(number).expect("a month or a day");
            date_time_ymd(at.year(), part(at.month()), part(at.day()))
        });
        (params.not_before, params.not_after) = (begin, end);
        params.distinguished_name.push(DnType::CommonName, "Cynai worker");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.self_signed(&key).map_err(failed)?;
        Ok(Self {
            names: names.to_vec(),
            not_after,
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Whether it is still good: for these very names, and not near its end.
    #[must_use]
    pub fn serves(&self, names: &[String], now: DateTime<Utc>) -> bool {
        self.names == names && now + RENEW_BEFORE < self.not_after
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeZone;

    use super::*;

    #[test]
    fn it_is_renewed_before_its_end_and_when_its_names_change() {
        let now = Utc.with_ymd_and_hms(2026, 11, 1, 0, 0, 0).unwrap();
        let names = ["worker.example".to_owned(), "127.0.0.1".to_owned()];
        let own = Own::make(&names, now).unwrap();
        assert!(own.serves(&names, now + TimeDelta::days(330)));
        assert!(!own.serves(&names, now + TimeDelta::days(336)));
        assert!(!own.serves(&names[..1], now));
        assert!(!format!("{own:?}").contains("PRIVATE"));
    }
}
