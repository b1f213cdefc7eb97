//! Signatures of webhooks, as the Standard Webhooks scheme writes them (version `v1`, HMAC-SHA256).
//!
//! What is signed is `ID.TIMESTAMP.BODY`, so that neither an old message can be sent again later nor one
//! message's signature be put on another.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use zeroize::Zeroizing;

/// What a key's text begins with.
const PREFIX: &str = "whsec_";
/// Bytes of a key that is made here.
const KEY_BYTES: usize = 32;

/// A text that is no signing key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a signing key is `whsec_` and 24 to 64 bytes in base64")]
pub struct NotAKey;

/// A new random key, in the form in which keys are handed on.
#[must_use]
pub fn new_key() -> SecretString {
    let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
    rand::fill(&mut bytes[..]);
    let mut text = String::with_capacity(64);
    text.push_str(PREFIX);
    let _ = write!(text, "{}", Zeroizing::new(STANDARD.encode(&bytes[..])).as_str());
    SecretString::from(text)
}

/// The value of `webhook-signature` for a message.
///
/// # Errors
/// `key` is no key.
pub fn sign(key: &SecretString, id: &str, timestamp: i64, body: &[u8]) -> Result<String, NotAKey> {
    let text = key.expose_secret().strip_prefix(PREFIX).ok_or(NotAKey)?;
    let key = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| NotAKey)?);
    if !(24..=64).contains(&key.len()) {
        return Err(NotAKey);
    }
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).map_err(|_| NotAKey)?;
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    Ok(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_s_own_example_is_signed_as_it_says() {
        let key = SecretString::from("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let signature =
            sign(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#);
        assert_eq!(signature.unwrap(), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_new_key_signs_and_what_is_none_does_not() {
        assert!(sign(&new_key(), "a", 1, b"").is_ok());
        assert_ne!(new_key().expose_secret(), new_key().expose_secret());
        for wrong in ["", "whsec_", "whsec_AAAA", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_%%"] {
            assert_eq!(sign(&SecretString::from(wrong), "a", 1, b""), Err(NotAKey), "{wrong}");
        }
    }
}
