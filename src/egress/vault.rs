//! How a secret is sealed: each under a random key of its own, and that key under a master key.
//!
//! Changing the master key therefore rewraps small keys and touches no secret. Both layers are
//! XChaCha20-Poly1305 and bind what they hold to its place: a value to its name and version, a data key to
//! name, version and master key. A row that was changed, or put in another's place, does not open.
//!
//! **Invariant:** what is sealed differs from call to call, so equal secrets do not look equal.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;

/// Names a master key without telling it: the first half of a hash, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A master key. It wipes itself, and `Debug` shows its id alone.
pub struct MasterKey {
    id: KeyId,
    key: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", self.id)
    }
}

/// A text that is no master key. It does not say which text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a master key is 32 bytes in base64, such as `openssl rand -base64 32` prints")]
pub struct NotAKey;

impl MasterKey {
    /// A new random key.
    #[must_use]
    pub fn random() -> Self {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        rand::fill(&mut key[..]);
        Self::new(key)
    }

    /// Reads a key's text.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> Result<Self, NotAKey> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| NotAKey)?);
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        if bytes.len() != KEY_BYTES {
            return Err(NotAKey);
        }
        key.copy_from_slice(&bytes);
        Ok(Self::new(key))
    }

    /// The key's text, for the file that it is kept in.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(&self.key[..]))
    }

    /// What the key is called.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    fn new(key: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let hash =
            Sha256::new().chain_update(b"cynai master key\0").chain_update(&key[..]).finalize();
        let id = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self { id: KeyId(id), key }
    }
}

/// A secret as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The master key that the data key is wrapped with.
    pub key_id: String,
    /// The data key: nonce and ciphertext.
    pub wrapped: Vec<u8>,
    /// The value: nonce and ciphertext.
    pub sealed: Vec<u8>,
}

/// The place of a secret, which it is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// Its name.
    pub name: &'a str,
    /// How often it was set.
    pub version: i32,
}

/// Why a secret does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VaultError {
    /// This server does not have the key.
    #[error(
        "the secret `{name}` is sealed with the master key {key_id}, which this server does not have (it has {known}): give it back, in the master key file or CYNAI_OLD_MASTER_KEYS, or set the secret anew"
    )]
    UnknownKey {
        /// The secret.
        name: String,
        /// The key that is missing.
        key_id: String,
        /// Those that are there.
        known: String,
    },
    /// It was changed, or is not the one that belongs here.
    #[error("the secret `{name}` does not open: its row was damaged or changed; set it anew")]
    Damaged {
        /// The secret.
        name: String,
    },
}

/// Master keys, the newest first: that one seals, and any of them opens.
#[derive(Debug)]
pub struct KeyRing {
    newest: MasterKey,
    older: Vec<MasterKey>,
}

impl KeyRing {
    /// A ring of these keys, the newest first; `None` without any.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = MasterKey>) -> Option<Self> {
        let mut keys = keys.into_iter();
        let newest = keys.next()?;
        Some(Self { newest, older: keys.collect() })
    }

    /// The key that seals.
    #[must_use]
    pub fn newest(&self) -> &KeyId {
        &self.newest.id
    }

    /// All keys, the newest first.
    pub fn ids(&self) -> impl Iterator<Item = &KeyId> {
        self.keys().map(|key| &key.id)
    }

    fn keys(&self) -> impl Iterator<Item = &MasterKey> {
        std::iter::once(&self.newest).chain(&self.older)
    }

    /// Seals a value for its place.
    #[must_use]
    pub fn seal(&self, place: Place<'_>, value: &SecretString) -> Sealed {
        let mut data_key = Zeroizing::new([0; KEY_BYTES]);
        rand::fill(&mut data_key[..]);
        Sealed {
            key_id: self.newest.id.0.clone(),
            wrapped: encrypt(
                &self.newest.key,
                &wrap_place(place, &self.newest.id.0),
                &data_key[..],
            ),
            sealed: encrypt(&data_key, &value_place(place), value.expose_secret().as_bytes()),
        }
    }

    /// Opens what was sealed for a place.
    ///
    /// # Errors
    /// The key is missing, or what is stored is not what was sealed there.
    pub fn open(&self, place: Place<'_>, sealed: &Sealed) -> Result<SecretString, VaultError> {
        let data_key = self.unwrap_key(place, &sealed.key_id, &sealed.wrapped)?;
        let damaged = || VaultError::Damaged { name: place.name.to_owned() };
        let value = decrypt(&data_key, &value_place(place), &sealed.sealed).ok_or_else(damaged)?;
        let text = std::str::from_utf8(&value).map_err(|_| damaged())?;
        Ok(SecretString::from(text))
    }

    /// Wraps a data key with the newest master key; answers that key's id and the wrapped key.
    ///
    /// # Errors
    /// As [`KeyRing::open`].
    pub fn rewrap(
        &self,
        place: Place<'_>,
        key_id: &str,
        wrapped: &[u8],
    ) -> Result<(String, Vec<u8>), VaultError> {
        let data_key = self.unwrap_key(place, key_id, wrapped)?;
        let newest = &self.newest;
        Ok((
            newest.id.0.clone(),
            encrypt(&newest.key, &wrap_place(place, &newest.id.0), &data_key[..]),
        ))
    }

    fn unwrap_key(
        &self,
        place: Place<'_>,
        key_id: &str,
        wrapped: &[u8],
    ) -> Result<Zeroizing<[u8; KEY_BYTES]>, VaultError> {
        let Some(master) = self.keys().find(|key| key.id.0 == key_id) else {
            let known = self.ids().map(KeyId::as_str).collect::<Vec<_>>().join(", ");
            let (name, key_id) = (place.name.to_owned(), key_id.to_owned());
            return Err(VaultError::UnknownKey { name, key_id, known });
        };
        let damaged = || VaultError::Damaged { name: place.name.to_owned() };
        let bytes =
            decrypt(&master.key, &wrap_place(place, key_id), wrapped).ok_or_else(damaged)?;
        if bytes.len() != KEY_BYTES {
            return Err(damaged());
        }
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        key.copy_from_slice(&bytes);
        Ok(key)
    }
}

/// What a value is bound to. The lengths keep parts apart.
fn value_place(place: Place<'_>) -> Vec<u8> {
    bound(b"cynai secret value 1", place, "")
}

/// What a data key is bound to.
fn wrap_place(place: Place<'_>, key_id: &str) -> Vec<u8> {
    bound(b"cynai secret key 1", place, key_id)
}

fn bound(purpose: &[u8], place: Place<'_>, key_id: &str) -> Vec<u8> {
    let mut all = Vec::new();
    for part in [purpose, place.name.as_bytes(), &place.version.to_be_bytes(), key_id.as_bytes()] {
        all.extend_from_slice(&(part.len() as u64).to_be_bytes());
        all.extend_from_slice(part);
    }
    all
}

/// Nonce and ciphertext.
fn encrypt(key: &[u8; KEY_BYTES], place: &[u8], plain: &[u8]) -> Vec<u8> {
    let mut nonce = [0; NONCE_BYTES];
    rand::fill(&mut nonce);
    let cipher = XChaCha20Poly1305::new(&(*key).into());
    let sealed = cipher
        .encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: place })
        .expect("fails for gigabytes only");
    [&nonce[..], &sealed].concat()
}

fn decrypt(key: &[u8; KEY_BYTES], place: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>()?;
    let cipher = XChaCha20Poly1305::new(&(*key).into());
    let plain = cipher.decrypt(&XNonce::from(*nonce), Payload { msg: sealed, aad: place });
    plain.ok().map(Zeroizing::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Place<'_> = Place { name: "openai", version: 1 };

    fn ring() -> KeyRing {
        KeyRing::new([MasterKey::random()]).unwrap()
    }

    #[test]
    fn what_was_sealed_opens_and_shows_nothing_before() {
        let (ring, value) = (ring(), SecretString::from("sk-very-secret"));
        let one = ring.seal(HERE, &value);
        assert_eq!(ring.open(HERE, &one).unwrap().expose_secret(), "sk-very-secret");
        let other = ring.seal(HERE, &value);
        assert_ne!(one.sealed, other.sealed);
        assert_ne!(one.wrapped, other.wrapped);
        let bytes = format!("{:?}", [one.sealed, one.wrapped].concat());
        assert!(!bytes.contains(&format!("{:?}", b"secret").replace(['[', ']'], "")));
    }

    #[test]
    fn a_changed_byte_or_another_place_does_not_open() {
        let (ring, value) = (ring(), SecretString::from("sk-very-secret"));
        let sealed = ring.seal(HERE, &value);
        let refused = |place, sealed: &Sealed| {
            let name = HERE.name.to_owned();
            let found = ring.open(place, sealed).map(|_| ()).unwrap_err();
            let damaged = VaultError::Damaged { name: place.name.to_owned() };
            assert_eq!(found, damaged, "{name}");
        };
        for at in 0..sealed.sealed.len() {
            let mut changed = sealed.clone();
            changed.sealed[at] ^= 1;
            refused(HERE, &changed);
        }
        for at in 0..sealed.wrapped.len() {
            let mut changed = sealed.clone();
            changed.wrapped[at] ^= 1;
            refused(HERE, &changed);
        }
        refused(Place { name: "openal", ..HERE }, &sealed);
        refused(Place { version: 2, ..HERE }, &sealed);
        let foreign = ring.seal(HERE, &value);
        refused(HERE, &Sealed { wrapped: foreign.wrapped, ..sealed.clone() });
        refused(HERE, &Sealed { sealed: sealed.sealed[..10].to_vec(), ..sealed.clone() });
        refused(HERE, &Sealed { wrapped: Vec::new(), ..sealed });
    }

    #[test]
    fn a_new_master_key_rewraps_and_the_old_one_is_not_needed_any_more() {
        let (old, new) = (MasterKey::random(), MasterKey::random());
        let texts = (old.to_text(), new.to_text());
        let key = |text: &str| MasterKey::parse(text).unwrap();
        let sealed = KeyRing::new([old]).unwrap().seal(HERE, &SecretString::from("value"));
        let both = KeyRing::new([new, key(&texts.0)]).unwrap();
        assert_eq!(both.open(HERE, &sealed).unwrap().expose_secret(), "value");
        let (key_id, wrapped) = both.rewrap(HERE, &sealed.key_id, &sealed.wrapped).unwrap();
        assert_eq!(&key_id, both.newest().as_str());
        let moved = Sealed { key_id, wrapped, sealed: sealed.sealed.clone() };
        let alone = KeyRing::new([key(&texts.1)]).unwrap();
        assert_eq!(alone.open(HERE, &moved).unwrap().expose_secret(), "value");
        let err = alone.open(HERE, &sealed).unwrap_err().to_string();
        assert!(err.contains(&sealed.key_id) && err.contains("CYNAI_OLD_MASTER_KEYS"), "{err}");
    }

    #[test]
    fn keys_do_not_print_themselves() {
        let key = MasterKey::random();
        let text = key.to_text();
        let ring = KeyRing::new([key]).unwrap();
        let shown = format!("{ring:?}");
        assert!(!shown.contains(text.as_str()) && shown.contains(ring.newest().as_str()));
        for wrong in ["", "short", "AAAA", "%%%"] {
            assert!(MasterKey::parse(wrong).is_err());
        }
    }
}
