use std::collections::HashMap;

use serde_json::json;

use super::*;

struct State(HashMap<&'static str, Shared>);

impl StateView for State {
    fn get(&self, channel: &str) -> Option<Shared> {
        self.0.get(channel).cloned()
    }
}

fn state() -> State {
    let big: Vec<Value> = (0..300).map(Value::from).collect();
    State(HashMap::from([
        ("n", json!(41).into()),
        ("ratio", json!(0.5).into()),
        ("name", json!("Ada").into()),
        ("files", json!(["a.log", "b.log"]).into()),
        ("user", json!({ "name": "Ada", "tags": ["x", "y"], "boss": null }).into()),
        ("big", Value::from(big).into()),
        ("text", json!("x".repeat(1 << 20)).into()),
        ("max", json!(u64::MAX).into()),
        ("list", Value::from(vec![json!("item"); 100_001]).into()),
    ]))
}

fn eval(source: &str) -> Result<Value, String> {
    let expr =
        Expr::compile(source, &["output", "item"]).map_err(|err| format!("compile: {err}"))?;
    let output = json!({ "stdout": " 12 \n", "exit_code": 0, "started": "2026-03-01T10:30:05Z" });
    let vars = [("output", Shared::new(output))];
    expr.eval(&Scope { state: &state(), vars: &vars }).map_err(|err| err.problem.to_string())
}

fn check(source: &str, expected: impl Into<Value>) {
    assert_eq!(eval(source), Ok(expected.into()), "{source}");
}

fn check_err(source: &str, part: &str) {
    match eval(source) {
        Ok(value) => panic!("{source} gave {value}, expected an error with {part:?}"),
        Err(err) => assert!(err.contains(part), "{source}: {err:?} does not contain {part:?}"),
    }
}

#[test]
fn arithmetic_follows_cel_and_mixes_integers_with_doubles() {
    check("state.n + 1", 42);
    check("7 / 2", 3);
    check("-7 / 2", -3);
    check("7 % 3", 1);
    check("7.0 / 2", 3.5);
    check("state.ratio * 2", 1.0);
    check("-state.n", -41);
    check("1 + 2 * 3", 7);
    check("state.max", u64::MAX);
    check("'a' + 'b'", "ab");
    check("[1] + [2, 3]", json!([1, 2, 3]));
    check("0x10 + 1", 17);
    check("-9223372036854775808", i64::MIN);
    check_err("state.max + 1", "out of the range");
    check_err("1 / 0", "divided by zero");
    check_err("1 % 0", "divided by zero");
    check_err("'a' + 1", "has no meaning");
    check_err("1.0 / 0.0", "is no number in JSON");
}

#[test]
fn comparisons_are_by_value_within_one_sort() {
    check("1 == 1.0", true);
    check("2 > 1.5", true);
    check("'b' > 'a'", true);
    check("1 == '1'", false);
    check("[1, {'a': 2}] == [1.0, {'a': 2}]", true);
    check("{'a': 1, 'b': 2} == {'b': 2, 'a': 1}", true);
    check("null == null", true);
    check("2 in [1, 2]", true);
    check("'name' in state.user", true);
    check("state.files != ['a.log']", true);
    check_err("1 < 'a'", "have no order");
    check_err("null < 1", "have no order");
}

#[test]
fn logic_gives_its_result_when_one_side_decides_it() {
    check("true || state.missing > 1", true);
    check("state.missing > 1 || true", true);
    check("state.missing > 1 && false", false);
    check("state.n > 1 ? 'many' : 'few'", "many");
    check("!(1 == 2)", true);
    check("[1, 0].exists(x, 4 / x == 4)", true);
    check("[0, 2].all(x, 4 / x == 9)", false);
    check_err("state.missing > 1 || false", "state.missing has no value yet");
    check_err("1 && true", "expected true or false");
    check_err("1 ? 2 : 3", "expected true or false");
}

#[test]
fn macros_walk_lists_and_the_keys_of_maps() {
    check("state.files.map(f, f.size())", json!([5, 5]));
    check("[1, 2, 3].filter(x, x > 1)", json!([2, 3]));
    check("[1, 2, 3].map(x, x > 1, x * 10)", json!([20, 30]));
    check("[1, 2].all(x, x > 0) && [1, 2].exists_one(x, x == 2)", true);
    check("state.user.map(k, k)", json!(["name", "tags", "boss"]));
    check("[[1, 2], [3]].map(x, x.map(y, y + size(x)))", json!([[3, 4], [4]]));
    check("[].all(x, x)", true);
    check_err("state.n.map(x, x)", "a macro walks a list or a map, not the int 41");
}

#[test]
fn has_is_false_wherever_the_path_breaks_off() {
    check("has(state.user.name)", true);
    check("has(state.user.nick)", false);
    check("has(state.user.boss.name)", false);
    check("has(state.nobody.name)", false);
    check("has(state.missing)", false);
    check("has(state.n)", true);
    check("has(output['stdout'])", true);
    check_err("has(1 + 1)", "compile: has() takes a field");
}

#[test]
fn missing_things_are_errors_that_name_them() {
    check_err("state.missing + 1", "state.missing has no value yet");
    check_err("state.user.nick", "there is no key `nick`");
    check_err("state.files[2]", "there is no key 2 in a list of 2 items");
    check_err("state.files[-1]", "there is no key -1");
    check_err("item", "item is not available here");
    check_err("state.name.first", "the string \"Ada\" has no fields");
    check("state.user['name'] + state['name']", "AdaAda");
}

#[test]
fn functions_convert_and_take_text_apart() {
    check("int(output.stdout.trim())", 12);
    check("int(2.9) + int(-2.9) + int('7')", 7);
    check("double('2.5')", 2.5);
    check("string(1.5) + string(true) + string([1, 'a'])", "1.5true[1,\"a\"]");
    check("type(1) + type(state.user)", "intmap");
    check("'a,b,,c'.split(',')", json!(["a", "b", "", "c"]));
    check("' a  b '.split()", json!(["a", "b"]));
    check("['a', 1, null].join('-')", "a-1-null");
    check("'Grüße'.upper() + 'ABC'.lower()", "GRÜSSEabc");
    check("'Grüße'.size()", 5);
    check("'a.b.c'.replace('.', '/')", "a/b/c");
    check("'Grüße'.substring(2, 4)", "üß");
    check("'abc'.substring(9)", "");
    check("'abc'.contains('b') && 'abc'.startsWith('a') && 'abc'.endsWith('c')", true);
    check("'log-12'.matches('^log-[0-9]+$')", true);
    check("'abc'.matches('b' + '.')", true);
    check("fromJson('{\"a\": [1]}').a[0]", 1);
    check("toJson({'a': [1, null]})", "{\"a\":[1,null]}");
    check("bool('true')", true);
    check_err("int('x')", "\"x\" is no integer");
    check_err("int(1e300)", "out of the range");
    check_err("double('inf')", "is no number");
    check_err("fromJson('{')", "no JSON");
    check_err("'a'.split('')", "not empty");
    check_err("'a'.substring(-1)", "no negative position");
}

#[test]
fn functions_work_on_lists_and_maps() {
    check("get(state.user, 'name', 'x') + state.user.get('nick', 'none')", "Adanone");
    check("state.files.get(9)", Value::Null);
    check("state.user.keys()", json!(["name", "tags", "boss"]));
    check("{'a': 1, 'b': 2}.values().sum()", 3);
    check("[1, 2.5].sum()", 3.5);
    check("[].sum()", 0);
    check("min([3, 1, 2]) + max(4, 7) + [9].min()", 17);
    check("[3, 1.5, 2].sort()", json!([1.5, 2, 3]));
    check("['b', 'a'].sort().reverse()", json!(["b", "a"]));
    check("[1, 1.0, 2, 'a', 'a'].distinct()", json!([1, 2, "a"]));
    check("[[1], 2, [3, [4]]].flatten()", json!([1, 2, 3, [4]]));
    check("[1, 2, 3].slice(1) + [1, 2, 3].slice(0, 1)", json!([2, 3, 1]));
    check("range(3) + range(5, 7)", json!([0, 1, 2, 5, 6]));
    check("range(5, 2)", json!([]));
    check("{'a': 1, 'b': 1}.merge({'b': 2})", json!({"a": 1, "b": 2}));
    check("abs(-3) + round(2.5) + floor(2.9) + ceil(2.1)", 11);
    check("size(state.files) + size(state.user)", 5);
    check_err("[1, 'a'].sort()", "have no order");
    check_err("max([])", "empty list");
    check_err("['a'].sum()", "adds numbers");
    check_err("{'a': 1, 'a': 2}", "there twice");
    check_err("{1: 2}", "keys of a map must be strings");
}

#[test]
fn instants_and_durations_are_computed_and_come_out_as_text() {
    check("timestamp(output.started) + duration('90s')", "2026-03-01T10:31:35Z");
    check("timestamp('2026-03-01T10:00:00+02:00').getHours()", 8);
    check("timestamp(output.started) - timestamp('2026-03-01T10:00:00Z')", "1805s");
    check("duration('1h30m').getMinutes()", 90);
    check("duration('0.5s') < duration('1s')", true);
    check("duration('-90s')", "-90s");
    check("int(timestamp('1970-01-01T00:01:00Z'))", 60);
    check("timestamp(60)", "1970-01-01T00:01:00Z");
    check("timestamp('2026-03-01T10:00:00Z').getDayOfWeek()", 0);
    check_err("timestamp('tomorrow')", "no RFC 3339 instant");
    check_err("duration('soon')", "is no duration");
}

#[test]
fn names_are_resolved_when_the_expression_is_compiled() {
    let check = |source: &str, message: &str, help: Option<&str>, offset: Option<usize>| {
        let err = Expr::compile(source, &["output", "run"]).expect_err(source);
        assert!(err.message.contains(message), "{source}: {err:?}");
        assert_eq!((err.help.as_deref(), err.offset), (help, offset), "{source}: {err:?}");
    };
    check("1 + outptu", "`outptu` is not available", Some("did you mean `output`?"), Some(4));
    check("state", "`state` alone", Some("name a channel, as in state.NAME"), Some(0));
    check(
        "now",
        "`now` is not available",
        Some("expressions are pure and do not know the time"),
        Some(0),
    );
    check("size", "not available", Some("a function is called: size(..)"), Some(0));
    check("siez([1])", "no function `siez`", Some("did you mean `size`?"), Some(4));
    check(
        "[1].map(run, run)",
        "already has a meaning",
        Some("choose another name for the item"),
        Some(8),
    );
    check(
        "state[run.id]",
        "named by a constant",
        Some("write state.NAME or state['NAME']"),
        Some(0),
    );
    check(
        "size(1, 2)",
        "is given 2 arguments",
        Some("it is used as size(x): characters of text, items of a list, keys of a map"),
        Some(4),
    );
    check("b'abc'", "bytes have no place", None, Some(0));
    check("'a'.matches('(')", "no regular expression", None, Some(11));
}

#[test]
fn syntax_errors_tell_the_place() {
    let check = |source: &str, offset: Option<usize>| {
        let err = Expr::compile(source, &[]).expect_err(source);
        assert!(err.message.starts_with("syntax error: "), "{source}: {}", err.message);
        assert_eq!(err.offset, offset, "{source}: {}", err.message);
    };
    check("1 +", Some(3));
    check("1 + * 2", Some(4));
    check("'ü' + * 2", Some(7));
    check("(1", Some(2));
    check("a b", Some(2));
}

#[test]
fn references_name_channels_and_variables() {
    let expr = Expr::compile(
        "state.a + state['b'] + output.x + [1].map(i, i + state.a)[0] + (has(state.c) ? 1 : 0)",
        &["output"],
    )
    .unwrap();
    assert_eq!(expr.references().channels, ["a", "b", "c"]);
    assert_eq!(expr.references().vars, ["output"]);
}

#[test]
fn a_source_over_a_limit_is_refused_before_it_is_parsed() {
    let check = |source: String, part: &str| {
        let err = Expr::compile(&source, &[]).expect_err(part);
        assert!(err.message.contains(part), "{part}: {}", err.message);
    };
    check(vec!["1"; 3_000].join("+"), "the limit is 2048");
    check(vec!["1"; 400].join("+"), "more than 400 tokens");
    check(format!("{}1{}", "(".repeat(40), ")".repeat(40)), "nests deeper");
    check(format!("{}true", "!".repeat(500)), "nests deeper");
    check(String::new(), "empty");
    check("[[1]].map(a, a.map(b, [1].map(c, [1].map(d, d))))".into(), "macros nest deeper");
}

/// The stack of a tokio worker, which is what evaluations run on.
fn on_a_small_stack(run: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

#[test]
fn the_largest_sources_that_are_accepted_fit_into_the_stack_of_a_worker() {
    on_a_small_stack(|| {
        for source in [
            vec!["1"; 200].join("+"),
            vec!["true"; 130].join("&&"),
            format!("{}1{}", "(".repeat(30), ")".repeat(30)),
            format!("{}1{}", "[".repeat(30), "]".repeat(30)),
            format!("{}true", "!".repeat(30)),
            format!("{}0", "true?1:".repeat(29)),
            format!("state.user{}", "[0]".repeat(130)),
            format!("'a'{}", ".trim()".repeat(95)),
        ] {
            match Expr::compile(&source, &[]) {
                Ok(expr) => drop(expr.eval(&Scope { state: &state(), vars: &[] })),
                Err(err) => panic!("{source}: {err}"),
            }
        }
    });
}

#[test]
fn an_evaluation_that_runs_long_or_builds_much_is_stopped() {
    let started = std::time::Instant::now();
    check_err("state.big.all(a, state.big.all(b, state.big.all(c, a + b + c >= 0)))", "steps");
    check_err("state.big.map(a, state.big.map(b, state.text + 'x'))", "bytes of memory");
    check_err("state.big.map(a, state.big.map(b, state.big))", "more than");
    check_err("state.list.all(a, true)", "items in a macro");
    check_err("range(1000000000)", "bytes of memory");
    check_err(&vec!["state.text"; 60].join("+"), "bytes of memory");
    check_err("state.text.replace('x', state.text)", "bytes of memory");
    check_err(
        "state.big.exists(a, state.text.replace('x', state.text) == 'a' || true == false)",
        "bytes of memory",
    );
    check_err("'a'.matches('(a{1000}){1000}{1000}')", "no regular expression");
    assert!(started.elapsed().as_secs() < 30, "took {:?}", started.elapsed());
}

#[test]
fn a_value_that_nests_too_deeply_is_no_result() {
    let mut deep = json!(1);
    for _ in 0..100 {
        deep = json!([deep]);
    }
    let expr = Expr::compile("[item]", &["item"]).unwrap();
    let vars = [("item", Shared::new(deep))];
    let err = expr.eval(&Scope { state: &state(), vars: &vars }).unwrap_err();
    assert!(err.to_string().contains("levels of lists and maps"), "{err}");
}

fn template(json: Value) -> Result<Value, String> {
    let template = Template::compile(&json, &["output"])
        .map_err(|err| format!("{}: {err} at {:?}", err.path.join("."), err.error.offset))?;
    let vars = [("output", Shared::new(json!({ "stdout": "12" })))];
    template.eval(&Scope { state: &state(), vars: &vars }).map_err(|err| err.to_string())
}

#[test]
fn templates_keep_the_type_of_a_lone_expression_and_format_the_rest() {
    let check =
        |json: Value, expected: Value| assert_eq!(template(json.clone()), Ok(expected), "{json}");
    check(json!("${state.files}"), json!(["a.log", "b.log"]));
    check(json!("${ state.n }"), json!(41));
    check(
        json!("n=${state.n}, ${state.name}: ${state.files}"),
        json!("n=41, Ada: [\"a.log\",\"b.log\"]"),
    );
    check(json!("$${state.n} costs $5"), json!("${state.n} costs $5"));
    check(json!("${state.n}$${x}${1}"), json!("41${x}1"));
    check(
        json!({ "a": ["${1 + 1}", true, null], "b": 3 }),
        json!({ "a": [2, true, null], "b": 3 }),
    );
    check(
        json!("${[{'file': state.name, 'n': int(output.stdout)}]}"),
        json!([{ "file": "Ada", "n": 12 }]),
    );
    check(json!("${'}' + \"{\"}"), json!("}{"));
    check(json!({ "$${k}": "$${v}" }), json!({ "$${k}": "${v}" }));
    check(json!(""), json!(""));
}

#[test]
fn template_errors_tell_the_path_and_the_place_in_the_string() {
    let check = |json: Value, expected: &str| assert_eq!(template(json), Err(expected.to_owned()));
    check(json!({ "a": ["x ${nope}"] }), "a.0: `nope` is not available here at Some(4)");
    check(json!("x ${1"), ": this `${` is not closed at Some(2)");
    check(json!("${}"), ": the expression is empty at Some(2)");
    check(json!("${state.missing}"), "state.missing has no value yet, in `state.missing`");
}

#[test]
fn a_template_that_is_a_lone_name_is_shared_not_copied() {
    let expr = Expr::compile("state.big", &[]).unwrap();
    let state = state();
    let shared = expr.eval_shared(&Scope { state: &state, vars: &[] }).unwrap();
    assert!(std::ptr::eq(shared.json(), state.0["big"].json()));
}

#[test]
fn conditions_must_be_boolean() {
    let scope = Scope { state: &state(), vars: &[] };
    assert_eq!(Expr::compile("state.n > 1", &[]).unwrap().eval_bool(&scope), Ok(true));
    let err = Expr::compile("state.n", &[]).unwrap().eval_bool(&scope).unwrap_err();
    assert_eq!(
        err.to_string(),
        "a condition must be true or false, this is the int 41, in `state.n`"
    );
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn no_source_makes_the_compiler_or_the_evaluator_panic(source in "[a-z0-9 .,:?!&|+*/%<>=(){}\\[\\]'\"$\\\\-]{0,80}") {
        let _ = eval(&source);
        let _ = template(json!(format!("a ${{{source}}} b")));
    }

    #[test]
    fn no_function_panics_on_any_arguments(
        at in 0..FUNCTIONS.len(),
        args in proptest::collection::vec(proptest::sample::select(vec![
            "null", "true", "1", "-1", "0", "9223372036854775807", "state.max", "0.5", "-1e308", "''", "'a'", "'ü1'", "[]",
            "[1, 'a', null]", "[0.5, 2]", "{}", "{'a': 1}", "state.user", "state.files", "duration('1s')", "timestamp(0)",
        ]), 1..4),
    ) {
        let _ = eval(&format!("{}({})", FUNCTIONS[at].name, args.join(", ")));
        if let [a, b, ..] = args.as_slice() {
            for op in ["+", "-", "*", "/", "%", "<", "==", "in", "&&"] {
                let _ = eval(&format!("{a} {op} {b}"));
            }
            let _ = eval(&format!("{a}[{b}]"));
        }
    }
}

/// `cargo nextest run --release --run-ignored only how_long`: prints nanoseconds.
#[test]
#[ignore = "a measurement"]
fn how_long_an_evaluation_takes() {
    let state = state();
    let scope = Scope { state: &state, vars: &[] };
    for source in
        ["state.n + 1", "state.n > 100", "state.big.all(x, x >= 0)", "state.files.map(f, f + '!')"]
    {
        let started = std::time::Instant::now();
        let expr = Expr::compile(source, &[]).unwrap();
        let compiled = started.elapsed();
        let started = std::time::Instant::now();
        for _ in 0..10_000 {
            std::hint::black_box(expr.eval(&scope).unwrap());
        }
        println!("{source}: compile {compiled:?}, eval {:?}", started.elapsed() / 10_000);
    }
}
