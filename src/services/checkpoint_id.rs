//! A checkpoint's name on the wire: a UUID that holds its branch and seq, so that none has to be stored.
//!
//! The first 48 bits are the seq, so ids of one branch sort by age; then the version (8, custom) with 12
//! bits of a check on the thread, the variant with 30 bits more of it, and the branch. An id of another
//! thread is recognised by the check and refers to nothing.

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::graph::step::Position;
use crate::ids::ThreadId;

/// The name of the checkpoint of `thread` at `position`.
pub(super) fn encode(thread: ThreadId, position: Position) -> Uuid {
    let seq = u128::from(position.seq.unsigned_abs() & 0xffff_ffff_ffff);
    let (high, low) = check_of(thread);
    let branch = u128::from(position.branch.unsigned_abs());
    let bits = (seq << 80) | (0x8 << 76) | (high << 64) | (0b10 << 62) | (low << 32) | branch;
    Uuid::from_u128(bits)
}

/// The position that `text` names in `thread`; `None` when it names none.
pub(super) fn decode(thread: ThreadId, text: &str) -> Option<Position> {
    let id = Uuid::parse_str(text).ok()?;
    let bits = id.as_u128();
    let position = Position {
        branch: i32::try_from(bits & 0xffff_ffff).ok()?,
        seq: i64::try_from(bits >> 80).ok()?,
    };
    (encode(thread, position) == id).then_some(position)
}

fn check_of(thread: ThreadId) -> (u128, u128) {
    let hash = Sha256::digest(thread.0.as_bytes());
    let bits = u128::from(u64::from_be_bytes([
        hash[0], hash[1], hash[2], hash[3], hash[4], hash[5], hash[6], hash[7],
    ]));
    (bits & 0xfff, (bits >> 12) & 0x3fff_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_as_positions_and_belong_to_one_thread() {
        let (mine, yours) = (ThreadId::new(), ThreadId(Uuid::from_u128(7)));
        for position in [(0, 0), (1, 5), (i32::MAX, (1 << 48) - 1)] {
            let position = Position { branch: position.0, seq: position.1 };
            let id = encode(mine, position);
            assert_eq!(decode(mine, &id.to_string()), Some(position));
            assert_eq!(decode(yours, &id.to_string()), None);
        }
        assert_eq!(decode(mine, "nonsense"), None);
        assert_eq!(decode(mine, &Uuid::nil().to_string()), None);
    }

    #[test]
    fn ids_of_a_branch_sort_by_age() {
        let thread = ThreadId::new();
        let id = |seq| encode(thread, Position { branch: 3, seq }).to_string();
        assert!(id(9) < id(10) && id(255) < id(256));
    }
}
