//! A server over pipes that misbehaves in each phase of its life.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cynai::tools::error::{Outcome, ToolErrorKind};
use cynai::tools::result::ContentPart;
use serde_json::json;

use super::{Site, call};

#[tokio::test]
async fn a_server_that_behaves_is_started_once_and_used() {
    let site = Site::stdio(&[]);
    assert_eq!(site.tools.status("s").unwrap().state, "stopped");
    let (one, other) = tokio::join!(
        site.call("echo", json!({"a": [1]})),
        site.call("add", json!({"list": [1, 2]}))
    );
    assert_eq!(one.unwrap().text(), "{\"a\": [1]}");
    assert_eq!(other.unwrap().structured, Some(json!({"n": 3})));
    let status = site.tools.status("s").unwrap();
    assert_eq!((status.state, status.protocol.as_deref()), ("running", Some("2025-11-25")));
    assert_eq!(status.name.as_deref(), Some("hostile 1"));
    assert_eq!(site.events().iter().filter(|seen| seen.starts_with("pid")).count(), 1);
    assert_eq!(site.events().iter().filter(|seen| *seen == "list").count(), 1);
    site.tools.close().await;
    let err = site.fail("echo", ToolErrorKind::Closing).await;
    assert_eq!(err.outcome, Outcome::NotSent);
}

#[tokio::test]
async fn both_versions_of_the_protocol_are_spoken_and_either_can_be_asked_for() {
    let modern = Site::stdio(&["modern"]);
    assert_eq!(modern.text("echo").await, "{}");
    assert_eq!(modern.tools.status("s").unwrap().protocol.as_deref(), Some("2026-07-28"));
    assert!(modern.events().iter().all(|seen| !seen.starts_with("initialize")));
    let old = Site::stdio_with(&["modern"], json!({"protocol": "2025-11-25"}));
    assert_eq!(old.text("echo").await, "{}");
    assert_eq!(old.tools.status("s").unwrap().protocol.as_deref(), Some("2025-11-25"));
    let new = Site::stdio_with(&[], json!({"protocol": "2026-07-28"}));
    new.fail("echo", ToolErrorKind::Unavailable).await;
}

#[tokio::test]
async fn a_server_that_dies_before_it_introduces_itself_explains_itself_without_its_key() {
    let site = Site::stdio(&["exit_before_init"]);
    let err = site.fail("echo", ToolErrorKind::Unavailable).await;
    assert_eq!(err.outcome, Outcome::NotSent);
    assert!(err.message.contains("my license has run out, [redacted]"), "{err}");
    assert!(err.message.contains("exit status: 3"), "{err}");
    let status = site.tools.status("s").unwrap();
    assert_eq!(status.state, "failed");
}

#[tokio::test]
async fn starts_that_fail_come_further_and_further_apart() {
    let site = Site::stdio(&["exit_before_init"]);
    let began = Instant::now();
    let paused = loop {
        let err = site.fail("echo", ToolErrorKind::Unavailable).await;
        if err.retry_after.is_some() {
            break err;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "it is started again and again");
    };
    // 100, 200, 400, 800 and 1600 ms are waited for; 3200 are told.
    let starts = site.events().iter().filter(|seen| seen.starts_with("pid")).count();
    assert!((4..=7).contains(&starts), "{starts}");
    assert!(began.elapsed() > Duration::from_secs(1));
    assert!(paused.message.contains("license"), "{paused}");
}

#[tokio::test]
async fn a_program_that_does_not_exist_is_named() {
    let site = Site::new(json!({"command": ["/no/such/program"]}));
    let err = site.fail("echo", ToolErrorKind::Unavailable).await;
    assert!(err.message.contains("/no/such/program"), "{err}");
    let site = Site::new(json!({"command": ["sh"], "env": {"A": {"secret": "none"}}}));
    let err = site.fail("echo", ToolErrorKind::Misconfigured).await;
    assert!(err.message.contains("env: A") && err.message.contains("add it"), "{err}");
    let site = Site::new(json!({"command": ["sh"], "cwd": "/no/such/place"}));
    let err = site.fail("echo", ToolErrorKind::Unavailable).await;
    assert!(err.message.contains("/no/such/place"), "{err}");
}

#[tokio::test]
async fn a_server_that_hangs_at_its_introduction_is_ended_after_start_timeout() {
    for mode in ["hang_init", "deaf"] {
        let more = json!({"start_timeout": "700ms", "protocol": "2025-11-25"});
        let site = Site::stdio_with(&[mode], more);
        let began = Instant::now();
        let err = site.fail("echo", ToolErrorKind::Unavailable).await;
        assert!(err.message.contains("start_timeout"), "{err}");
        assert!(began.elapsed() < Duration::from_secs(5));
        super::processes::all_gone(site.dir.path()).await;
    }
}

#[tokio::test]
async fn an_introduction_that_is_none_is_refused() {
    let site = Site::stdio(&["wrong_init"]);
    site.fail("echo", ToolErrorKind::Unavailable).await;
}

#[tokio::test]
async fn a_server_that_dies_after_its_introduction_or_while_it_lists_did_nothing() {
    for mode in ["exit_after_init", "exit_in_list"] {
        let site = Site::stdio(&[mode]);
        let err = site.call("echo", json!({})).await.unwrap_err();
        let kinds = [ToolErrorKind::ServerDied, ToolErrorKind::Unavailable];
        assert!(kinds.contains(&err.kind), "{mode}: {err:?}");
        assert_eq!(err.outcome, Outcome::NotSent, "{mode}");
    }
}

#[tokio::test]
async fn a_list_that_never_comes_fails_the_call_that_needs_it() {
    let site = Site::stdio_with(&["hang_list"], json!({"timeout": "500ms"}));
    let err = site.fail("echo", ToolErrorKind::Timeout).await;
    assert_eq!(err.outcome, Outcome::NotSent);
}

#[tokio::test]
async fn a_server_that_dies_in_a_call_fails_the_calls_under_way_and_is_started_again() {
    let site = Site::stdio(&[]);
    assert_eq!(site.text("echo").await, "{}");
    let (dying, waiting) = tokio::join!(site.call("die", json!({})), site.call("hang", json!({})));
    for err in [dying.unwrap_err(), waiting.unwrap_err()] {
        assert_eq!((err.kind, err.outcome), (ToolErrorKind::ServerDied, Outcome::Unknown), "{err}");
        assert!(err.message.contains("not known"), "{err}");
    }
    assert_eq!(site.text("echo").await, "{}");
    assert_eq!(site.events().iter().filter(|seen| seen.starts_with("pid")).count(), 2);
}

#[tokio::test]
async fn a_result_that_came_before_the_server_died_counts() {
    let site = Site::stdio(&[]);
    assert_eq!(site.text("die_after").await, "my last");
    assert_eq!(site.text("echo").await, "{}");
}

#[tokio::test]
async fn a_call_that_hangs_times_out_alone_and_the_server_is_told() {
    let site = Site::stdio(&[]);
    let mut hanging = call("hang", json!({}));
    hanging.timeout = Some(Duration::from_millis(800));
    let others = async {
        for _ in 0..5 {
            assert_eq!(site.text("echo").await, "{}");
        }
    };
    let (hung, ()) = tokio::join!(site.tools.call(hanging, None), others);
    let err = hung.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::Timeout, Outcome::Unknown));
    site.saw("cancelled", 1).await;
    assert_eq!(site.text("echo").await, "{}");
    assert_eq!(site.events().iter().filter(|seen| seen.starts_with("pid")).count(), 1);
}

#[tokio::test]
async fn the_server_is_told_when_the_caller_goes_away() {
    let site = Site::stdio(&[]);
    let gone = tokio::time::timeout(Duration::from_millis(700), site.text("hang")).await;
    assert!(gone.is_err());
    site.saw("cancelled", 1).await;
}

#[tokio::test]
async fn calls_over_max_parallel_wait_and_then_fail() {
    let site = Site::stdio_with(&[], json!({"max_parallel": 1, "timeout": "1s"}));
    site.text("echo").await;
    let hang = site.call("hang", json!({}));
    let mut soon = call("echo", json!({}));
    soon.timeout = Some(Duration::from_millis(200));
    let (_, busy) = tokio::join!(hang, site.tools.call(soon, None));
    let err = busy.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::Busy, Outcome::NotSent));
    assert!(err.message.contains("max_parallel"), "{err}");
}

#[tokio::test]
async fn answers_that_nobody_asked_for_are_ignored() {
    let site = Site::stdio(&["strays"]);
    for _ in 0..3 {
        assert_eq!(site.text("twice").await, "one");
        assert_eq!(site.text("unknown_id").await, "right");
        assert_eq!(site.text("echo").await, "{}");
    }
}

#[tokio::test]
async fn a_flood_of_progress_is_thinned_and_counted() {
    let site = Site::stdio(&[]);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&seen);
    let sink = Arc::new(move |note| kept.lock().unwrap().push(note));
    let result = site.tools.call(call("flood", json!({})), Some(sink)).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len() as u64 + result.progress_left_out, 20_000);
    assert!((1..=300).contains(&seen.len()), "{}", seen.len());
    assert_eq!(seen[0].total, Some(20_000.0));
    // One message is 2,000 characters long.
    assert!(seen.iter().all(|note| note.message.as_ref().unwrap().len() < 600));
    assert!(seen.windows(2).all(|pair| pair[0].progress < pair[1].progress));
}

#[tokio::test]
async fn a_server_that_only_asks_is_given_up_on() {
    let site = Site::stdio(&[]);
    let began = Instant::now();
    let result = site.call("pings", json!({})).await;
    // It reads what it is answered, so it may also be served to the end; it must not hang or grow.
    assert!(result.is_ok() || result.unwrap_err().kind == ToolErrorKind::ServerDied);
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn text_between_the_messages_is_ignored() {
    let site = Site::stdio(&["noisy"]);
    assert_eq!(site.text("echo").await, "{}");
    assert_eq!(
        site.call("add", json!({"list": [2]})).await.unwrap().structured,
        Some(json!({"n": 2}))
    );
}

#[tokio::test]
async fn a_result_over_the_limit_fails_its_call_and_nothing_else() {
    let site = Site::stdio(&[]);
    let (big, other) = tokio::join!(site.call("big", json!({})), site.call("echo", json!({})));
    let err = big.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::TooLarge, Outcome::Answered));
    assert!(err.message.contains("max_output") && err.message.contains("1048576"), "{err}");
    other.unwrap();
    // Over the limit for results, but not for messages.
    let err = site.call("big", json!({"bytes": 2 << 20})).await.unwrap_err();
    assert_eq!(err.kind, ToolErrorKind::TooLarge);
    let fits = site.call("big", json!({"bytes": 1 << 19})).await.unwrap();
    assert!(fits.bytes > 1 << 19 && fits.bytes < 1 << 20);
    assert_eq!(site.events().iter().filter(|seen| seen.starts_with("pid")).count(), 1);
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_fails_its_call_at_once() {
    let site = Site::stdio(&[]);
    for tool in ["bad_utf8", "not_json", "odd"] {
        let began = Instant::now();
        let err = site.fail(tool, ToolErrorKind::Protocol).await;
        assert_eq!(err.outcome, Outcome::Answered);
        assert!(began.elapsed() < Duration::from_secs(5), "{tool}");
    }
    assert_eq!(site.text("echo").await, "{}");
}

#[tokio::test]
async fn results_are_held_against_their_schema() {
    let site = Site::stdio(&[]);
    let err = site.fail("bad_output", ToolErrorKind::InvalidOutput).await;
    assert_eq!((err.path.as_deref(), err.outcome), (Some("/n"), Outcome::Answered));
    site.fail("no_output", ToolErrorKind::InvalidOutput).await;
}

#[tokio::test]
async fn arguments_are_held_against_their_schema_before_anything_is_sent() {
    let site = Site::stdio(&[]);
    let err = site.call("add", json!({"list": [1, "two"]})).await.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::InvalidArguments, Outcome::NotSent));
    assert_eq!(err.path.as_deref(), Some("/list/1"));
    let err = site.call("add", json!({})).await.unwrap_err();
    assert!(err.message.contains("list"), "{err}");
    let err = site.call("bad_schema", json!({})).await.unwrap_err();
    assert!(err.message.contains("example.com"), "{err}");
    let mut long = call("echo", json!({"a": "x".repeat(5 << 20)}));
    assert_eq!(
        site.tools.call(long.clone(), None).await.unwrap_err().kind,
        ToolErrorKind::InvalidArguments
    );
    long = call("echo", json!({}));
    long.idempotency_key = Some("k".repeat(300));
    assert!(site.tools.call(long, None).await.is_err());
    assert!(site.events().iter().all(|seen| !seen.starts_with("call")), "{:?}", site.events());
}

#[tokio::test]
async fn a_server_that_asks_back_for_ever_is_answered_a_few_times() {
    let site = Site::stdio_with(&["modern"], json!({"elicitation": "defaults"}));
    site.fail("ask", ToolErrorKind::InputRequired).await;
    assert_eq!(site.events().iter().filter(|seen| *seen == "asks").count(), 9);
    assert_eq!(site.text("echo").await, "{}");
}

#[tokio::test]
async fn errors_and_failures_of_tools_are_told_apart() {
    let site = Site::stdio(&[]);
    let failed = site.call("fail", json!({})).await.unwrap();
    assert!(failed.is_error && failed.text() == "it did not work");
    let err = site.fail("refuse", ToolErrorKind::Refused).await;
    assert!(err.message.contains("no: [redacted]"), "{err}");
    let err = site.fail("ask", ToolErrorKind::InputRequired).await;
    assert_eq!(err.outcome, Outcome::Answered);
    site.fail("nothing", ToolErrorKind::UnknownTool).await;
    let mut elsewhere = call("echo", json!({}));
    elsewhere.server = "t".to_owned();
    let err = site.tools.call(elsewhere, None).await.unwrap_err();
    assert_eq!(err.kind, ToolErrorKind::UnknownServer);
}

#[tokio::test]
async fn parts_of_a_result_keep_their_kinds() {
    let site = Site::stdio(&[]);
    let result = site.call("parts", json!({})).await.unwrap();
    let [ContentPart::Data { url, .. }, ContentPart::Link { uri, .. }] = &result.content[..] else {
        panic!("{result:?}");
    };
    assert_eq!((url.as_str(), uri.as_str()), ("data:image/png;base64,aGk=", "file:///a"));
}

#[tokio::test]
async fn the_idempotency_key_goes_with_the_request() {
    let site = Site::stdio(&[]);
    let mut keyed = call("echo", json!({}));
    keyed.idempotency_key = Some("task-1".to_owned());
    site.tools.call(keyed, None).await.unwrap();
    site.saw("call echo task-1", 1).await;
}

#[tokio::test]
async fn a_server_sees_its_own_environment_only_and_cannot_show_its_key() {
    let site = Site::stdio(&[]);
    let result = site.call("env", json!({})).await.unwrap();
    assert!(!serde_json::to_string(&result).unwrap().contains("hunter2"));
    let seen = result.structured.unwrap();
    assert_eq!(seen["KEY"], "[redacted]");
    let home = site.dir.path().join("homes/s");
    assert_eq!((&seen["HOME"], &seen["cwd"]), (&json!(home), &json!(home)));
    let usual =
        ["PATH", "HOME", "LANG", "KEY", "EVENTS", "PWD", "SHLVL", "_", "LC_CTYPE", "OLDPWD", "cwd"];
    let names = seen.as_object().unwrap().keys();
    let others: Vec<_> = names.filter(|name| !usual.contains(&name.as_str())).collect();
    assert!(others.is_empty(), "{others:?}");
}

#[tokio::test]
async fn lists_come_in_pages_and_end() {
    let count = async |site: &Site| site.tools.list("s").await.map(|tools| tools.len());
    let pages = Site::stdio(&["pages"]);
    assert!(count(&pages).await.unwrap() > 25);
    assert!(pages.events().iter().filter(|seen| *seen == "list").count() >= 3);
    assert_eq!(count(&Site::stdio(&["no_tools"])).await.unwrap(), 0);
    for (mode, expected) in
        [("endless", "100 pages"), ("many", "1000 tools"), ("double", "echo twice")]
    {
        let err = count(&Site::stdio(&[mode])).await.unwrap_err();
        assert_eq!(err.kind, ToolErrorKind::Protocol, "{mode}");
        assert!(err.message.contains(expected), "{err}");
    }
    let odd = count(&Site::stdio(&["odd_tools"])).await.unwrap();
    assert_eq!(odd, count(&pages).await.unwrap());
}

#[tokio::test]
async fn a_change_that_is_announced_is_seen_at_once() {
    for modes in [&[][..], &["modern"][..]] {
        let site = Site::stdio(modes);
        let names = async || -> Vec<String> {
            site.tools.list("s").await.unwrap().into_iter().map(|tool| tool.name).collect()
        };
        assert!(!names().await.contains(&"novel".to_owned()));
        if !modes.is_empty() {
            site.saw("listen", 1).await;
        }
        site.text("mutate").await;
        assert!(names().await.contains(&"novel".to_owned()), "{modes:?}");
        assert!(!names().await.contains(&"slow".to_owned()), "{modes:?}");
        assert_eq!(site.text("echo").await, "{}");
    }
}

#[tokio::test]
async fn only_the_tools_that_are_allowed_are_there() {
    let site = Site::stdio_with(&[], json!({"tools": ["echo"]}));
    assert_eq!(site.tools.list("s").await.unwrap().len(), 1);
    let err = site.fail("add", ToolErrorKind::NotAllowed).await;
    assert_eq!(err.outcome, Outcome::NotSent);
    assert_eq!(site.text("echo").await, "{}");
}

#[tokio::test]
async fn a_tool_that_is_not_the_pinned_one_is_not_called() {
    let site = Site::stdio(&[]);
    let echo = async || {
        let tools = site.tools.list("s").await.unwrap();
        tools.into_iter().find(|tool| tool.name == "echo").unwrap().hash()
    };
    let pinned = echo().await;
    let mut pinned_call = call("echo", json!({}));
    pinned_call.pin = Some(pinned.clone());
    site.tools.call(pinned_call.clone(), None).await.unwrap();
    site.text("mutate").await;
    let err = site.tools.call(pinned_call, None).await.unwrap_err();
    assert_eq!((err.kind, err.outcome), (ToolErrorKind::Changed, Outcome::NotSent));
    assert_ne!(echo().await, pinned);
    assert_eq!(site.events().iter().filter(|seen| seen.starts_with("call echo")).count(), 1);
}
