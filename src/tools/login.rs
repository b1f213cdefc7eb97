//! A server's login: what is needed for one, and the one that waits for a person.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use url::Url;

use super::error::{ToolError, ToolErrorKind, quoted};
use super::server::Server;
use super::wire::login::{self, Begin, Begun, Kept};
use crate::config::tools::{OAuthConfig, WireConfig};

/// How long a person has to agree.
const AGREE_PATIENCE: Duration = Duration::from_secs(600);
/// How long asking authorization servers may take, for one step.
const STEP_PATIENCE: Duration = Duration::from_secs(60);
/// The longest challenge that is kept, in bytes.
const MAX_CHALLENGE: usize = 16 << 10;

/// What is known of a server's login.
#[derive(Debug, Default)]
pub(super) struct Login {
    /// The server's own words for programs when it last refused a request.
    challenge: Mutex<Option<String>>,
    begun: tokio::sync::Mutex<Option<(Instant, Begun)>>,
}

impl Server {
    /// Where this server's login is kept.
    pub(super) fn kept_login(&self) -> Kept {
        Kept::new(Arc::clone(&self.context.keys), &self.name)
    }

    /// The error of a request that the server refused for want of a login.
    pub(super) fn login_required(&self, challenge: Option<String>) -> ToolError {
        let name = &self.name;
        if self.oauth().is_err() {
            let message = format!(
                "the tool server {name} wants other credentials; look at its `headers`, or give it `oauth: {{}}`"
            );
            return ToolError::new(ToolErrorKind::Unavailable, message);
        }
        let challenge = challenge.filter(|challenge| challenge.len() <= MAX_CHALLENGE);
        if challenge.is_some() {
            *self.login.challenge.lock().unwrap_or_else(PoisonError::into_inner) = challenge;
        }
        let message = format!(
            "the tool server {name} wants a login, or one that may do more: an administrator makes it with \
             `cynai tools login {name}`"
        );
        ToolError::new(ToolErrorKind::LoginRequired, message)
    }

    fn oauth(&self) -> Result<(&Url, &OAuthConfig), ToolError> {
        match &self.config.wire {
            WireConfig::Http { url, oauth: Some(oauth), .. } => Ok((url, &**oauth)),
            _ => {
                let message = format!(
                    "nobody logs in to the tool server {}: its configuration has no `oauth`",
                    self.name
                );
                Err(ToolError::new(ToolErrorKind::Misconfigured, message))
            }
        }
    }

    /// Begins a login, in place of one that nobody has agreed to.
    pub(super) async fn begin_login(&self, redirect_uri: &Url) -> Result<String, ToolError> {
        let (url, oauth) = self.oauth()?;
        let secret = match &oauth.client_secret {
            None => None,
            Some(source) => Some(self.context.keys.value(source).await.map_err(|err| {
                let message = format!("the tool server {}: oauth: client_secret: {err}", self.name);
                ToolError::new(ToolErrorKind::Misconfigured, message)
            })?),
        };
        let challenge = self.login.challenge.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let kept = self.kept_login();
        let begin = Begin { url, oauth, secret, challenge, redirect_uri, kept };
        let (begun, agree) = self.step(login::begin(begin)).await?;
        *self.login.begun.lock().await = Some((Instant::now(), begun));
        Ok(agree)
    }

    /// Finishes the login that was begun last.
    pub(super) async fn finish_login(&self, led_to: &Url) -> Result<(), ToolError> {
        self.oauth()?;
        let mut begun = self.login.begun.lock().await;
        let fresh = begun.take().filter(|(at, _)| at.elapsed() < AGREE_PATIENCE);
        let Some((at, login)) = fresh else {
            let minutes = AGREE_PATIENCE.as_secs() / 60;
            let message = format!(
                "no login to the tool server {} was begun here in the last {minutes} minutes: begin anew",
                self.name
            );
            return Err(ToolError::new(ToolErrorKind::LoginRequired, message));
        };
        if let Err(err) = self.step(login.finish(led_to)).await {
            // A forged answer must not end the login that a person is about to agree to.
            *begun = Some((at, login));
            return Err(err);
        }
        *self.login.challenge.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.begin_anew();
        tracing::info!(
            tools.server = self.name,
            "there is a login to the tool server {}",
            self.name
        );
        Ok(())
    }

    async fn step<T>(&self, step: impl Future<Output = Result<T, String>>) -> Result<T, ToolError> {
        let done = tokio::time::timeout(STEP_PATIENCE, step).await;
        let done = done.unwrap_or_else(|_| Err(format!("it took longer than {STEP_PATIENCE:?}")));
        done.map_err(|problem| {
            let message =
                format!("no login to the tool server {}: {}", self.name, quoted(&problem));
            ToolError::new(ToolErrorKind::LoginRequired, message)
        })
    }
}
