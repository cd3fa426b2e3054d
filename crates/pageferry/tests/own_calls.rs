//! What the program's own system calls answer about memory that moves: the same as ever, if need
//! be once the pages are there. Where they answer something else it is known, and written down in
//! `docs/design.md`, "What the program's own calls answer".

mod support;

#[path = "own_calls/buffers.rs"]
mod buffers;
#[path = "own_calls/call.rs"]
mod call;
#[path = "own_calls/mappings.rs"]
mod mappings;
#[path = "own_calls/others.rs"]
mod others;
#[path = "own_calls/stage.rs"]
mod stage;

use call::Call;
use others::Other;
use pageferry::{Engine, Order};
use pageferry_copy::Kernel;
use stage::{At, Layout, Spot, Stage, at_rest, while_held, while_moving};
use std::time::Duration;
use support::siege::{Watchdog, again, alone, role};
use support::{build, patient, thinned};

fn engine() -> Option<Engine> {
    build(Engine::builder().kernel(Kernel::MEMCPY).threads(2).frame_budget(16 << 20))
}

/// All that there is to see of a call.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    said: Vec<i64>,
    after: Vec<i64>,
    pages: Vec<i64>,
    damaged: usize,
    mappings: Vec<(usize, usize, String)>,
}

impl Seen {
    fn new(said: Vec<i64>, call: &Call, stage: &Stage, spot: &Spot) -> Self {
        let after = (call.after)(spot);
        let pages = stage.pages(spot, call.blind);
        Self { said, after, pages, damaged: stage.damaged(spot), mappings: stage.mappings() }
    }
}

/// Where the two differ.
fn difference(seen: &Seen, expected: &Seen) -> String {
    let mut text = String::new();
    let mut tell = |what: &str, seen: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| {
        let (seen, expected) = (format!("{seen:?}"), format!("{expected:?}"));
        if seen != expected {
            text += &format!("\n  {what}: {seen}\n    as ever: {expected}");
        }
    };
    tell("it says", &seen.said, &expected.said);
    tell("afterwards", &seen.after, &expected.after);
    tell("the pages", &seen.pages, &expected.pages);
    tell("others damaged", &seen.damaged, &expected.damaged);
    tell("the mappings", &seen.mappings, &expected.mappings);
    text
}

/// What there is to see of `act` where nothing moves.
fn undisturbed(layout: Layout, at: At, call: &Call, act: fn(&Spot) -> Vec<i64>) -> Seen {
    let stage = Stage::new(layout);
    let spot = stage.spot(at);
    (call.prepare)(&spot);
    Seen::new(act(&spot), call, &stage, &spot)
}

/// Makes the call about pages that are in the air, and protected; tells what is not as documented.
fn held(engine: &Engine, layout: Layout, at: At, call: &Call, wrong: &mut Vec<String>) {
    for order in [Order::Frozen, Order::Live] {
        held_in(engine, layout, at, call, order, wrong);
    }
}

fn held_in(
    engine: &Engine,
    layout: Layout,
    at: At,
    call: &Call,
    order: Order,
    wrong: &mut Vec<String>,
) {
    let verdict = if order == Order::Frozen { call.air } else { call.protected };
    let expected = undisturbed(layout, at, call, verdict.instead.unwrap_or(call.act));
    // What waits is let go soon; what does not has all the time that a slow machine takes.
    let patience =
        if verdict.waits { Duration::from_millis(5) } else { Duration::from_secs(patient(5)) };
    for _ in 0..16 {
        let stage = Stage::new(layout);
        let spot = stage.spot(at);
        (call.prepare)(&spot);
        let act = || (call.act)(&spot);
        let Some((said, returned)) = while_held(engine, (&stage, &spot), order, patience, act)
        else {
            continue;
        };
        let seen = Seen::new(said, call, &stage, &spot);
        if seen != expected || returned == verdict.waits {
            let waited = if returned { "returned at once" } else { "waited" };
            let difference = difference(&seen, &expected);
            wrong.push(format!("{} {layout:?} {at:?} {order:?}: {waited}{difference}", call.name));
        }
        return;
    }
    panic!("{} {layout:?} {at:?} {order:?}: its pages are never in the air together", call.name);
}

/// Makes the call again and again beside moves.
fn beside_moves(engine: &Engine, call: &Call, border: bool, wrong: &mut Vec<String>) {
    type All = (Vec<i64>, Vec<i64>, Vec<i64>);
    let made = |act: fn(&Spot) -> Vec<i64>, stage: &Stage, spot: &Spot| -> All {
        (call.prepare)(spot);
        let said = act(spot);
        (said, (call.after)(spot), stage.pages(spot, call.blind))
    };
    let expected: Vec<All> = [Some(call.act), call.air.instead, call.protected.instead]
        .into_iter()
        .flatten()
        .map(|act| {
            let (stage, spot) = at_rest();
            made(act, &stage, &spot)
        })
        .collect();
    for layout in [Layout::Whole, Layout::Part] {
        for order in [Order::Frozen, Order::Live] {
            while_moving(engine, layout, order, border, |stage, spot| {
                let seen = made(call.act, stage, spot);
                if !expected.contains(&seen) {
                    wrong.push(format!(
                        "{} beside moves {layout:?} {order:?}:\n  {seen:?}\n  {expected:?}",
                        call.name
                    ));
                }
            });
        }
    }
}

fn all_right(wrong: &[String]) {
    let some = wrong[..wrong.len().min(16)].join("\n");
    assert!(wrong.is_empty(), "{} answers are not as documented:\n{some}", wrong.len());
}

const INSIDE: [(Layout, At); 2] = [(Layout::Whole, At::Inside), (Layout::Part, At::Inside)];
const BORDERS: [(Layout, At); 2] = [(Layout::Part, At::Border), (Layout::Clipped, At::Border)];

/// Why this machine or user cannot make the call, if so.
fn lacks(call: &Call) -> Option<i64> {
    let said = undisturbed(Layout::Whole, At::Inside, call, call.act).said;
    let differs = call.air.instead.is_some();
    let lacks = |&said: &i64| match i32::try_from(-said) {
        Ok(libc::ENOSYS | libc::EPERM | libc::EACCES) => true,
        // Advice that an older kernel does not know.
        Ok(libc::EINVAL) => differs,
        _ => false,
    };
    said.first().copied().filter(lacks)
}

/// Makes each call at each place while a move is held, and where it is fit for that, beside moves;
/// tells what is not as documented.
fn answers(calls: &[Call], places: &[(Layout, At)]) -> Vec<String> {
    let _alone = alone();
    let Some(engine) = engine() else { return Vec::new() };
    let mut wrong = Vec::new();
    for call in thinned(calls) {
        let _watchdog = Watchdog::new(call.name);
        if let Some(errno) = lacks(call) {
            eprintln!("skipped in part: {} is not possible here: errno {}", call.name, -errno);
            continue;
        }
        for &(layout, at) in places {
            held(&engine, layout, at, call, &mut wrong);
        }
        if call.again {
            let border = places.iter().any(|(_, at)| *at == At::Border);
            beside_moves(&engine, call, border, &mut wrong);
        }
    }
    wrong
}

fn answer_as_documented(calls: &[Call], places: &[(Layout, At)]) {
    all_right(&answers(calls, places));
}

#[test]
fn calls_that_change_mappings_or_tell_of_them_answer_as_documented() {
    answer_as_documented(mappings::MAPPINGS, &[INSIDE, BORDERS].concat());
}

#[test]
fn advice_is_taken_as_documented() {
    answer_as_documented(mappings::ADVICE, &[INSIDE, BORDERS].concat());
}

#[test]
fn memory_that_the_kernel_reads_and_writes_is_waited_for() {
    answer_as_documented(buffers::BUFFERS, &[INSIDE, BORDERS].concat());
}

#[test]
fn what_the_kernel_is_lent_or_cannot_wait_for_is_as_documented() {
    answer_as_documented(buffers::LENT, &[INSIDE, BORDERS].concat());
}

#[test]
fn other_processes_wait_for_memory_or_are_refused() {
    if role().as_deref() == Some(others::ROLE) {
        return others::serve();
    }
    let _other = Other::start("other_processes_wait_for_memory_or_are_refused");
    answer_as_documented(others::OTHERS, &[INSIDE, BORDERS].concat());
}

#[test]
fn calls_on_a_whole_mapping_that_moves_answer_as_ever() {
    let calls: Vec<Call> = mappings::WHOLE.iter().map(|call| call.once()).collect();
    answer_as_documented(&calls, &[(Layout::Whole, At::Inside)]);
}

/// In processes of its own: it fills the engine's memory, too.
#[test]
fn locking_all_memory_waits_for_what_is_in_the_air() {
    let orders = [("all locked, frozen", Order::Frozen), ("all locked, live", Order::Live)];
    if let Some(role) = role() {
        let (_, order) = orders.into_iter().find(|(name, _)| *name == role).expect("a role");
        let Some(engine) = engine() else { return };
        let _watchdog = Watchdog::new(&role);
        let mut wrong = Vec::new();
        held_in(&engine, Layout::Part, At::Inside, &mappings::LOCK_ALL, order, &mut wrong);
        return all_right(&wrong);
    }
    let _alone = alone();
    for (name, _) in orders {
        let test = "locking_all_memory_waits_for_what_is_in_the_air";
        let output = again(test, name).output().expect("this binary runs again");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {:?}: {text}", output.status);
    }
}

#[test]
fn mremap_within_what_moves_answers_as_ever() {
    answer_as_documented(mappings::REMAPS, &INSIDE);
}

#[test]
fn mremap_across_the_end_of_a_region_or_of_a_mapping_made_meanwhile_is_refused() {
    answer_as_documented(mappings::ACROSS, &[(Layout::Clipped, At::Border)]);
    answer_as_documented(mappings::SEAM, &INSIDE);
}

/// Where the old range lies within the managed part of one mapping, however little of that moves.
#[test]
fn mremap_within_an_adopted_mapping_answers_as_ever() {
    let once = |calls: &[Call]| calls.iter().map(|call| call.once()).collect::<Vec<_>>();
    let inside = INSIDE.as_slice();
    let border = &[(Layout::Part, At::Border)];
    let ends = &[(Layout::Whole, At::End), (Layout::Tail, At::End)];
    let wrong = [
        answers(&once(&[mappings::MAPS]), &inside[1..]),
        answers(&once(mappings::WHOLE), &[(Layout::Part, At::Inside), (Layout::Tail, At::Inside)]),
        answers(mappings::REMAPS, border),
        answers(mappings::GROWTH, &[inside, border].concat()),
        answers(&once(mappings::GROWTH_IN_PLACE), ends),
    ];
    all_right(&wrong.concat());
}
