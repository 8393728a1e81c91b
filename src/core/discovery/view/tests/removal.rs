//! Which members leave, and when.

use super::*;

#[test]
fn an_answer_that_only_removes_takes_effect_at_once() {
    let mut bench = Bench::with(guards(), 4);
    assert!(bench.tell([1, 2, 4]));
    assert_eq!(bench.addresses(), [1, 2, 4]);
}

#[test]
fn an_empty_answer_is_held_until_a_later_one_confirms_it() {
    let mut bench = Bench::with(guards(), 2);
    bench.tell([]);
    assert_eq!(bench.addresses(), [1, 2]);
    assert_eq!(bench.held(1), Some(HeldReason::Small));
    let held = bench.status().held_answer.unwrap();
    assert_eq!((held.removes, held.confirmable_in), (2, Some(secs(10))));
    bench.pass(secs(9));
    assert!(!bench.tell([]));
    assert_eq!(bench.addresses(), [1, 2]);
    bench.pass(secs(1));
    assert!(bench.tell([]));
    assert!(bench.addresses().is_empty());
    assert!(bench.view.has_answer());
}
