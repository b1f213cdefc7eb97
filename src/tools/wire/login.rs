//! Logins to servers, by OAuth: begun, finished, and taken up again by each connection.
//!
//! The library does the protocol: it finds the authorization server, checks whom it speaks to, and renews what
//! runs out. Here is what it is told, and where the login is kept.
//!
//! **Invariant:** a login is read anew for every request, so that one that was made elsewhere counts at once.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rmcp::transport::auth::{
    AuthError, AuthorizationCallback, AuthorizationManager, AuthorizationMetadata, CredentialStore,
    OAuthClientConfig, StoredCredentials,
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::Url;

use super::Failure;
use crate::config::tools::OAuthConfig;
use crate::tools::keys::Keys;

/// How this client is called where it registers itself.
const CLIENT_NAME: &str = "Cynai";
/// The most scopes that a login asks for.
const MAX_SCOPES: usize = 256;

/// The client that a login was made with; which one it is stands in the credentials.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Client {
    secret: Option<String>,
    redirect_uri: String,
}

/// A login as it is kept.
#[derive(Serialize, Deserialize)]
struct Stored {
    client: Client,
    credentials: Option<StoredCredentials>,
}

/// The place where the login to one server is kept.
#[derive(Clone)]
pub(in crate::tools) struct Kept {
    keys: Arc<dyn Keys>,
    server: String,
    client: Arc<Mutex<Client>>,
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Kept {
    /// The login to `server` that `keys` keep.
    pub(in crate::tools) fn new(keys: Arc<dyn Keys>, server: &str) -> Self {
        Self { keys, server: server.to_owned(), client: Arc::default() }
    }

    fn client(&self) -> Client {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_client(&self, client: Client) {
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }

    async fn keep(&self, credentials: Option<StoredCredentials>) -> Result<(), AuthError> {
        let stored = serde_json::to_string(&Stored { client: self.client(), credentials });
        let stored = stored.map_err(|err| AuthError::CredentialStoreError(err.to_string()))?;
        let kept = self.keys.keep_login(&self.server, SecretString::from(stored)).await;
        kept.map_err(|err| AuthError::CredentialStoreError(err.to_string()))
    }
}

#[async_trait]
impl CredentialStore for Kept {
    async fn load(&self) -> Result<Option<StoredCredentials>, AuthError> {
        let kept = self.keys.login(&self.server).await;
        let kept = kept.map_err(|err| AuthError::CredentialStoreError(err.to_string()))?;
        let Some(kept) = kept else { return Ok(None) };
        // The reason is left out: it could repeat a part of the login.
        let stored: Stored = serde_json::from_str(kept.expose_secret()).map_err(|_| {
            AuthError::CredentialStoreError("what is kept of the login cannot be read".to_owned())
        })?;
        self.set_client(stored.client);
        Ok(stored.credentials)
    }

    async fn save(&self, credentials: StoredCredentials) -> Result<(), AuthError> {
        self.keep(Some(credentials)).await
    }

    async fn clear(&self) -> Result<(), AuthError> {
        self.keep(None).await
    }
}

/// A login that waits for a person.
pub(in crate::tools) struct Begun(AuthorizationManager);

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Begun")
    }
}

/// What a login is begun with.
#[derive(Debug)]
pub(in crate::tools) struct Begin<'a> {
    pub(in crate::tools) url: &'a Url,
    pub(in crate::tools) oauth: &'a OAuthConfig,
    /// The value of the configured secret.
    pub(in crate::tools) secret: Option<SecretString>,
    /// The server's own words for programs, when it refused a request.
    pub(in crate::tools) challenge: Option<String>,
    pub(in crate::tools) redirect_uri: &'a Url,
    pub(in crate::tools) kept: Kept,
}

/// Begins a login. Answers where a person agrees to it.
///
/// # Errors
/// Why there is none, in words that may hold what the server said.
pub(in crate::tools) async fn begin(begin: Begin<'_>) -> Result<(Begun, String), String> {
    begun(begin).await.map_err(|err| told(&err))
}

async fn begun(begin: Begin<'_>) -> Result<(Begun, String), AuthError> {
    let Begin { url, oauth, secret, challenge, redirect_uri, kept } = begin;
    let mut manager = AuthorizationManager::new(url.as_str()).await?;
    // One that cannot be read is replaced.
    let before = kept.load().await.ok().flatten();
    let found = manager.resolve_metadata_from_challenge(challenge.as_deref()).await?;
    let metadata = found.metadata;
    manager.set_metadata(metadata.clone());
    let mut scopes = if oauth.scopes.is_empty() {
        manager.select_initial_scopes(&[]).await
    } else {
        oauth.scopes.clone()
    };
    // A login that may do more may still do what it could before.
    let granted = before.filter(|before| before.issuer == metadata.issuer);
    for scope in granted.into_iter().flat_map(|before| before.granted_scopes) {
        if !scopes.contains(&scope) {
            scopes.push(scope);
        }
    }
    scopes.truncate(MAX_SCOPES);
    let scopes: Vec<&str> = scopes.iter().map(String::as_str).collect();
    let client = match registered(oauth, secret, &metadata, redirect_uri) {
        Some(client) => client,
        None => manager.register_client(CLIENT_NAME, redirect_uri.as_str(), &scopes).await?,
    };
    kept.set_client(Client {
        secret: client.client_secret.clone(),
        redirect_uri: client.redirect_uri.clone(),
    });
    manager.configure_client(client)?;
    manager.set_credential_store(kept);
    let agree = manager.get_authorization_url(&scopes).await?;
    // A person is asked to open it.
    let page = Url::parse(&agree).is_ok_and(|page| matches!(page.scheme(), "https" | "http"));
    if !page {
        let problem = "where it would have a person agree is no web page".to_owned();
        return Err(AuthError::MetadataError(problem));
    }
    Ok((Begun(manager), agree))
}

/// The client that need not be registered any more.
fn registered(
    oauth: &OAuthConfig,
    secret: Option<SecretString>,
    metadata: &AuthorizationMetadata,
    redirect_uri: &Url,
) -> Option<OAuthClientConfig> {
    if let Some(id) = &oauth.client_id {
        let client = OAuthClientConfig::new(id, redirect_uri.as_str());
        return Some(match secret {
            Some(secret) => client.with_client_secret(secret.expose_secret()),
            None => client,
        });
    }
    let reads = metadata.additional_fields.get("client_id_metadata_document_supported");
    let document = oauth.client_metadata_url.as_ref();
    let document = document.filter(|_| reads.is_some_and(|reads| reads == true))?;
    Some(OAuthClientConfig::new(document.as_str(), redirect_uri.as_str()))
}

impl Begun {
    /// Finishes the login with the address that the person was led to, and keeps it.
    ///
    /// # Errors
    /// Why there is none, in words that may hold what the server said.
    pub(in crate::tools) async fn finish(&self, led_to: &Url) -> Result<(), String> {
        let parameters: HashMap<_, _> = led_to.query_pairs().collect();
        if let Some(error) = parameters.get("error") {
            let more = parameters.get("error_description").map(|more| format!(" ({more})"));
            return Err(format!("it was refused: {error}{}", more.unwrap_or_default()));
        }
        let callback = AuthorizationCallback::from_redirect_url(led_to.as_str());
        let callback = callback.map_err(|err| told(&err))?;
        let AuthorizationCallback { code, csrf_token, issuer, .. } = callback;
        let exchanged =
            self.0.exchange_code_for_token_with_issuer(&code, &csrf_token, issuer.as_deref());
        exchanged.await.map(drop).map_err(|err| told(&err))
    }
}

/// What a connection takes the login from.
///
/// # Errors
/// The kept login cannot be read, or the authorization server does not answer.
pub(super) async fn resumed(url: &Url, kept: Kept) -> Result<AuthorizationManager, Failure> {
    let resumed = async {
        let mut manager = AuthorizationManager::new(url.as_str()).await?;
        manager.set_credential_store(kept.clone());
        if manager.initialize_from_store().await? {
            let (id, _) = manager.get_credentials().await?;
            let Client { secret, redirect_uri } = kept.client();
            let client = OAuthClientConfig::new(id, redirect_uri);
            manager.configure_client(match secret {
                Some(secret) => client.with_client_secret(secret),
                None => client,
            })?;
        }
        Ok(manager)
    };
    resumed.await.map_err(|err| failure(&err))
}

/// What a failure of a login means for the request that wanted to use it.
pub(super) fn failure(err: &AuthError) -> Failure {
    match err {
        AuthError::AuthorizationRequired
        | AuthError::TokenExpired
        | AuthError::TokenRefreshRejected(_) => Failure::LoginRequired(None),
        err => Failure::Unreachable(format!("the login to it cannot be used: {}", told(err))),
    }
}

fn told(err: &AuthError) -> String {
    let mut text = err.to_string();
    let mut next = std::error::Error::source(err);
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
