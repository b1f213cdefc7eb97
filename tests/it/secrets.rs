//! Secrets: told to nobody, sealed for their place, and moved to another master key whatever happens meanwhile.

use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::process::Stdio;
use std::sync::Arc;

use cynai::clock::SystemClock;
use cynai::config::MasterKeys;
use cynai::config::values::SecretSource;
use cynai::egress::keyfile;
use cynai::egress::vault::{KeyRing, MasterKey};
use cynai::services::error::ServiceError;
use cynai::services::secrets::Vault;
use cynai::services::{Egress, ServiceLimits, Services};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::support::server::{Site, Start, until};
use crate::support::{Answer, TestSystem};

const VALUE: &str = "sk-Very+Secret/Value_0123456789";

fn egress(keys: impl IntoIterator<Item = MasterKey>) -> Egress {
    let vault = Vault::Open(Arc::new(KeyRing::new(keys).unwrap()));
    Egress { vault, ..Egress::default() }
}

async fn system(pool: PgPool) -> TestSystem {
    let system = TestSystem::start(pool).await;
    system.services.set_egress(egress([MasterKey::random()]));
    system
}

/// Another server's operations on the same database.
fn services(pool: &PgPool, egress: Egress) -> Services {
    let services = Services::new(pool.clone(), Arc::new(SystemClock), ServiceLimits::default());
    services.set_egress(egress);
    services
}

async fn set(system: &TestSystem, name: &str, value: &str) -> Answer {
    system.call(Method::PUT, &format!("/v1/secrets/{name}"), json!({ "value": value })).await
}

async fn value_of(services: &Services, name: &str) -> Result<String, String> {
    let found = services.secret_value(&SecretSource::Secret(name.to_owned())).await;
    found.map(|value| value.expose_secret().to_owned()).map_err(|err| err.to_string())
}

/// Everything that the database holds, as text.
async fn dump(pool: &PgPool) -> String {
    let tables: Vec<String> = sqlx::query_scalar(
        "select table_name::text from information_schema.tables where table_schema = 'public'",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert!(tables.len() > 10);
    let mut all = String::new();
    for table in tables {
        let text = format!("select coalesce(string_agg(x::text, e'\\n'), '') from {table} x");
        let rows: String =
            sqlx::query_scalar(sqlx::AssertSqlSafe(text)).fetch_one(pool).await.unwrap();
        all += &rows;
    }
    all
}

fn assert_absent(text: &str, value: &str) {
    use base64::Engine;

    let hex: String = value.bytes().map(|byte| format!("{byte:02x}")).collect();
    let base64 = base64::engine::general_purpose::STANDARD_NO_PAD.encode(value);
    for form in [value, &hex, &base64[..base64.len() - 2]] {
        assert!(!text.contains(form), "the secret is in: {text}");
    }
}

#[sqlx::test]
async fn a_secret_is_told_to_nobody(pool: PgPool) {
    let system = system(pool).await;
    let first = set(&system, "openai", VALUE).await;
    assert_eq!(first.expect(200)["version"], 1);
    let second = set(&system, "openai", VALUE).await;
    assert_eq!(second.expect(200)["version"], 2);
    let listed = system.get("/v1/secrets").await;
    let rows = listed.expect(200);
    assert_eq!((&rows[0]["name"], &rows[0]["owner"]), (&json!("openai"), &json!("admin")));
    let one = system.get("/v1/secrets/openai").await;
    assert_eq!(one.expect(200), rows[0]);
    let wrong = [
        system.call(Method::PUT, "/v1/secrets/a", json!({ "value": [VALUE] })).await,
        system.call(Method::PUT, "/v1/secrets/a", json!({ VALUE: VALUE })).await,
        system.call(Method::PUT, "/v1/secrets/a", json!(VALUE)).await,
        set(&system, "a%2Fb", VALUE).await,
        set(&system, "rotate", VALUE).await,
    ];
    let statuses: Vec<u16> = wrong.iter().map(|answer| answer.status.as_u16()).collect();
    assert_eq!(statuses, [422, 422, 422, 422, 405]);
    for answer in wrong.iter().chain([&first, &second, &listed, &one]) {
        assert_absent(&answer.text, VALUE);
    }
    assert_absent(&dump(&system.pool).await, VALUE);
    assert_absent(&format!("{:?}", system.services), VALUE);
    // It is there for all that, for those who may have it.
    assert_eq!(value_of(&system.services, "openai").await.as_deref(), Ok(VALUE));
    system.call(Method::DELETE, "/v1/secrets/openai", Value::Null).await.expect(204);
    system
        .call(Method::DELETE, "/v1/secrets/openai", Value::Null)
        .await
        .expect_error(404, "not_found");
    let gone = value_of(&system.services, "openai").await.unwrap_err();
    assert!(gone.contains("cynai secrets set openai"), "{gone}");
}

#[sqlx::test]
async fn limits_are_named_and_only_an_administrator_may(pool: PgPool) {
    let system = system(pool).await;
    set(&system, "most", &"x".repeat(64 << 10)).await.expect(200);
    let large = set(&system, "large", &"x".repeat((64 << 10) + 1)).await;
    assert!(large.expect(413)["detail"].as_str().unwrap().contains("at most 65536"));
    set(&system, "empty", "").await.expect(422);
    set(&system, &"n".repeat(129), "x").await.expect(422);
    let anna = system.user("anna").await;
    for (method, path) in [
        (Method::GET, "/v1/secrets"),
        (Method::GET, "/v1/secrets/most"),
        (Method::PUT, "/v1/secrets/most"),
        (Method::DELETE, "/v1/secrets/most"),
        (Method::POST, "/v1/secrets/rotate"),
    ] {
        let answer = system.call_as(&anna, method.clone(), path, json!({"value": "x"})).await;
        assert_eq!(answer.status, 403, "{method} {path}: {}", answer.text);
    }
}

#[sqlx::test]
async fn a_row_that_was_changed_or_moved_is_refused(pool: PgPool) {
    let system = system(pool).await;
    for (name, value) in [("one", "first"), ("two", "second")] {
        set(&system, name, value).await.expect(200);
    }
    let services = &system.services;
    let change = async |sql: &'static str| {
        let mut tx = system.pool.begin().await.unwrap();
        sqlx::query(sql).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    };
    // One secret's row under another's name: the version is the same, the name is not.
    change(
        "update secrets o set key_id = t.key_id, wrapped = t.wrapped, sealed = t.sealed
           from secrets t where o.name = 'one' and t.name = 'two'",
    )
    .await;
    let moved = value_of(services, "one").await.unwrap_err();
    assert!(moved.contains("`one` does not open"), "{moved}");
    assert_eq!(value_of(services, "two").await.as_deref(), Ok("second"));
    change("update secrets set version = version + 1 where name = 'two'").await;
    assert!(value_of(services, "two").await.is_err());
    change("update secrets set version = version - 1 where name = 'two'").await;
    assert_eq!(value_of(services, "two").await.as_deref(), Ok("second"));
    change("update secrets set sealed = set_byte(sealed, 30, get_byte(sealed, 30) # 1) where name = 'two'").await;
    assert!(value_of(services, "two").await.is_err());
    // Set anew it opens, whatever was there.
    set(&system, "two", "third").await.expect(200);
    assert_eq!(value_of(services, "two").await.as_deref(), Ok("third"));
}

#[sqlx::test]
async fn a_missing_master_key_is_named_and_nothing_else_stops(pool: PgPool) {
    let system = system(pool.clone()).await;
    set(&system, "openai", VALUE).await.expect(200);
    let key = system.get("/v1/secrets/openai").await.expect(200)["key_id"].clone();
    let admin = system.services.authenticate(&system.token).await.unwrap();
    let other = services(&pool, egress([MasterKey::random()]));
    other.check_secrets().await.unwrap();
    let err = value_of(&other, "openai").await.unwrap_err();
    assert!(err.contains(key.as_str().unwrap()) && err.contains("CYNAI_OLD_MASTER_KEYS"), "{err}");
    let rotated = other.rotate_secrets(&admin).await.unwrap();
    assert_eq!((rotated.rotated, rotated.failed[0].name.as_str()), (0, "openai"));
    assert!(rotated.failed[0].reason.contains(key.as_str().unwrap()));
    // Without any key at all the reason is told, and everything else works.
    let none = services(&pool, Egress::default());
    let err = none.set_secret(&admin, "a", &"x".into()).await.unwrap_err();
    assert!(matches!(err, ServiceError::Unavailable { .. }), "{err:?}");
    assert!(err.to_string().contains("no master key"), "{err}");
    assert_eq!(none.list_secrets(&admin, 10, 0).await.unwrap().len(), 1);
    assert_eq!(value_of(&system.services, "openai").await.as_deref(), Ok(VALUE));
}

#[sqlx::test]
async fn a_rotation_that_is_killed_in_the_middle_is_taken_up_again(pool: PgPool) {
    let url = sqlx::ConnectOptions::to_url_lossy(pool.connect_options().as_ref());
    let site = Site::on_database(&[], url.as_str()).with_flags(&["--no-local-worker"]);
    let key_file = site.path("data0/master.key");
    let mut server = site.start(&Start::default()).await;
    assert_eq!(std::fs::metadata(&key_file).unwrap().permissions().mode() & 0o777, 0o600);
    let client = server.client();
    for number in 0..250 {
        let body = json!({ "value": format!("{VALUE}{number}") });
        client.call(Method::PUT, &format!("/v1/secrets/s{number:03}"), Some(&body)).await.unwrap();
    }
    server.stop().await;
    let old = std::fs::read_to_string(&key_file).unwrap();
    let new = MasterKey::random();
    std::fs::write(&key_file, format!("{}\n{old}", new.to_text().as_str())).unwrap();
    // It stands still before the commit of the second batch, and never comes to it.
    let frozen = Start { freeze_at: Some(("secrets rotated", 2)), ..Start::default() };
    server = site.start(&frozen).await;
    let client = server.client();
    let rotate = async move { client.post("/v1/secrets/rotate", &json!({})).await };
    let mut rotating = JoinSet::from_iter([rotate]);
    until("the server stands still", async || server.is_frozen().then_some(())).await;
    server.kill();
    assert!(rotating.join_next().await.unwrap().unwrap().is_err());
    let under = async |key: &str| -> i64 {
        sqlx::query_scalar("select count(*) from secrets where key_id = $1")
            .bind(key.to_owned())
            .fetch_one(&pool)
            .await
            .unwrap()
    };
    assert_eq!(under(new.id().as_str()).await, 100);
    server = site.start(&Start::default()).await;
    let done = server.client().post("/v1/secrets/rotate", &json!({})).await.unwrap();
    assert_eq!((&done["rotated"], &done["failed"]), (&json!(150), &json!([])));
    assert_eq!(under(new.id().as_str()).await, 250);
    assert_absent(&std::fs::read_to_string(site.path("log0")).unwrap(), VALUE);
    server.stop().await;
    assert_absent(&dump(&pool).await, VALUE);
    // The new key alone opens them all.
    let alone = site.path("alone.key");
    let mut file = std::fs::File::options();
    file.write(true).create_new(true).mode(0o600).open(&alone).unwrap();
    std::fs::write(&alone, new.to_text().as_bytes()).unwrap();
    let from = MasterKeys { environment: Vec::new(), file: alone, make: false };
    let vault = Vault::Open(Arc::new(keyfile::load(&from).unwrap()));
    let services = services(&pool, Egress { vault, ..Egress::default() });
    for number in 0..250 {
        let found = value_of(&services, &format!("s{number:03}")).await;
        assert_eq!(found, Ok(format!("{VALUE}{number}")));
    }
}

#[sqlx::test]
async fn the_command_reads_standard_input_and_a_key_file_that_was_open_is_refused(pool: PgPool) {
    use tokio::io::AsyncWriteExt;

    let url = sqlx::ConnectOptions::to_url_lossy(pool.connect_options().as_ref());
    let site = Site::on_database(&[], url.as_str()).with_flags(&["--no-local-worker"]);
    let server = site.start(&Start::default()).await;
    let (base, token) = (server.address().to_owned(), site.path("token"));
    let cynai = async |arguments: &[&str], input: &str| {
        let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_cynai"))
            .args(arguments)
            .env_clear()
            .env("CYNAI_SERVER", &base)
            .env("CYNAI_TOKEN_FILE", &token)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).await.unwrap();
        drop(stdin);
        let output = child.wait_with_output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let (good, said) = cynai(&["secrets", "set", "openai"], &format!("{VALUE}\n")).await;
    assert!(good && said.contains("set openai, version 1"), "{said}");
    let (good, listed) = cynai(&["secrets", "list"], "").await;
    assert!(good && listed.contains("openai"), "{listed}");
    let (good, empty) = cynai(&["secrets", "set", "empty"], "\n").await;
    assert!(!good && empty.contains("< FILE"), "{empty}");
    // A value among the arguments is no way to pass one.
    let (good, argued) = cynai(&["secrets", "set", "openai", "value"], "").await;
    assert!(!good, "{argued}");
    assert_absent(&[said, listed].concat(), VALUE);
    server.stop().await;
    let key_file = site.path("data0/master.key");
    std::fs::set_permissions(&key_file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let server = site.start(&Start::default()).await;
    assert!(server.log_tail().contains("chmod 600"), "{}", server.log_tail());
    let client = server.client();
    let refused = client.call(Method::PUT, "/v1/secrets/a", Some(&json!({"value": "x"}))).await;
    assert!(format!("{refused:?}").contains("chmod 600"), "{refused:?}");
    client.get("/v1/me").await.unwrap();
}
