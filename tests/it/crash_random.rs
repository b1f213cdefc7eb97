//! Servers are killed at random moments under load, and every run that was accepted ends right.
//!
//! Each kill comes after some progress, at a moment drawn from a seed that is printed and can be given
//! again as `CYNAI_CRASH_SEED`. After each kill the tables are read while no server lives: nothing that
//! was committed then may run again later.

use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::support::load::{GRAPHS, Load};
use crate::support::server::{Site, Start};
use crate::support::traces::Committed;

/// Numbers that look random and come again with the same seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % sides
    }
}

#[expect(clippy::disallowed_methods, reason = "what a person sets for a test")]
pub(crate) fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

async fn kill_at_random(kills: u32) {
    let seed = setting("CYNAI_CRASH_SEED")
        .unwrap_or_else(|| u64::try_from(Uuid::now_v7().as_u128() >> 64).unwrap());
    let limit =
        setting("CYNAI_CRASH_SECONDS").filter(|seconds| *seconds > 0).map(Duration::from_secs);
    println!("seed: CYNAI_CRASH_SEED={seed}");
    let mut dice = Dice(seed);
    let site = Site::new(&GRAPHS).with_flags(&["--no-local-worker", "--lease", "30s"]);
    let begun = Instant::now();
    let mut load = Load::new();
    let mut server = site.start(&Start::default()).await;
    let mut db = site.database().await;
    let mut made = 0;
    let mut before: Option<Committed> = None;
    while made < kills && limit.is_none_or(|limit| begun.elapsed() < limit) {
        let lines = 5 + usize::try_from(dice.roll(120)).unwrap();
        load.progress(&server, &site, &mut db, lines).await;
        // So that the moment is not always the end of a look.
        tokio::time::sleep(Duration::from_micros(dice.roll(20_000))).await;
        server.kill();
        made += 1;
        let now = Committed::read(&mut db, &site.traces()).await;
        if let Some(before) = before.replace(now) {
            before.check(&mut db, &site.traces()).await;
        }
        server = site.start(&Start::default()).await;
    }
    load.finish(&server, &site, &mut db).await;
    before.expect("there was a kill").check(&mut db, &site.traces()).await;
    println!("{made} of {kills} kills in {:.1?}: {:?}", begun.elapsed(), load.tally);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_random_20() {
    kill_at_random(20).await;
}

/// Honours `CYNAI_CRASH_SECONDS`: then it may stop before it has made all its kills, and says how many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crash_long_random_200() {
    kill_at_random(200).await;
}
