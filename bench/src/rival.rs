//! Who is timed, whether they answer right, and the order of turns.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::answer::{Answer, Question};
use crate::element::Element;
use crate::op::{Impl, Op};
use crate::record::{GradNorms, median};
use crate::sets::Set;

/// A rival this many times slower than the fastest ...
const SLOW: f64 = 10.0;
/// ... takes part in one of so many rounds.
const ROUNDS_PER_SLOW: usize = 5;
/// Who has taken this long for an operation is done with it.
const PATIENCE_MS: f64 = 15_000.0;
/// Rounds that are played even after the deadline.
const LEAST_ROUNDS: usize = 3;

/// Who is timed. `P` is what those in this program share: gradients, parameters, a clock.
pub(crate) trait Rival<P> {
    fn name(&self) -> &str;
    /// What its answer is compared with.
    fn question(&self, place: &P, op: Op) -> Question;
    /// Does the operation from the start of training, a step twice, and shows what that leaves, if
    /// it is anything in particular.
    fn answer(&mut self, place: &mut P, question: &Question) -> Result<Option<Answer>>;
    /// Makes ready for timing, after everyone's answer.
    fn prepare(&mut self, place: &mut P, question: &Question) -> Result<()>;
    /// Milliseconds of each of some calls.
    fn time(&mut self, place: &mut P, calls: usize) -> Result<Vec<f64>>;
    /// Whether it is its own process, whose failures end nothing else.
    fn is_elsewhere(&self) -> bool {
        false
    }
}

/// Compares a rival's answer with the right one, and returns the relative error of its norm.
pub(crate) fn check<P>(rival: &mut dyn Rival<P>, place: &mut P, op: Op) -> Result<Option<f64>> {
    let question = rival.question(place, op);
    let answer = rival.answer(place, &question)?;
    answer.map_or(Ok(None), |answer| question.check(&answer))
}

/// How often everyone has their turn.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Calls before the first that counts.
    pub(crate) warm_ups: usize,
    pub(crate) rounds: usize,
    /// Of a turn.
    pub(crate) calls: usize,
    /// Of how many rounds pasted code takes part in one.
    pub(crate) per_paste_in: usize,
    /// Whether the slow have fewer turns, and who is very slow has no more.
    pub(crate) spares_slow: bool,
    /// When no other round begins.
    pub(crate) deadline: Option<Instant>,
}

impl Plan {
    pub(crate) fn new(rounds: usize) -> Self {
        Self {
            warm_ups: 0,
            rounds,
            calls: 1,
            per_paste_in: 1,
            spares_slow: false,
            deadline: None,
        }
    }
}

/// A rival's times.
pub(crate) struct Times {
    pub(crate) name: String,
    /// Relative, where the rival says what the norm is.
    norm_error: Option<f64>,
    /// In milliseconds; at least one.
    pub(crate) ms: Vec<f64>,
}

impl Times {
    pub(crate) fn measured<E: Element>(mut self, set: Set, op: Op) -> GradNorms {
        self.ms.sort_by(f64::total_cmp);
        GradNorms {
            set: set.name(),
            dtype: E::DTYPE.as_str(),
            op: op.name(),
            rival: self.name,
            calls: self.ms.len(),
            median_ms: median(&self.ms),
            min_ms: self.ms[0],
            norm_error: self.norm_error,
        }
    }
}

/// Who takes turns.
struct Player<'a, P> {
    rival: &'a mut dyn Rival<P>,
    found: Times,
    /// Why it takes no part any more.
    failure: Option<String>,
}

impl<'a, P> Player<'a, P> {
    fn new(rival: &'a mut dyn Rival<P>, norm_error: Option<f64>) -> Self {
        Self {
            found: Times {
                name: rival.name().to_owned(),
                norm_error,
                ms: Vec::new(),
            },
            rival,
            failure: None,
        }
    }

    fn fastest(&self) -> f64 {
        self.found.ms.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn is_pasted(&self) -> bool {
        self.found.name == Impl::PasteIn.name()
    }

    fn takes_part(&self, round: usize, fastest_of_all: f64, plan: &Plan) -> bool {
        if plan.spares_slow {
            let is_slow = round > 0 && self.fastest() > SLOW * fastest_of_all;
            let is_done = self.found.ms.iter().sum::<f64>() > PATIENCE_MS;
            let sits_out = is_slow && !round.is_multiple_of(ROUNDS_PER_SLOW);
            return !is_done && !sits_out;
        }
        !self.is_pasted() || round.is_multiple_of(plan.per_paste_in)
    }

    fn turn(&mut self, place: &mut P, calls: usize) -> Result<()> {
        if self.failure.is_some() {
            return Ok(());
        }
        match self.rival.time(place, calls) {
            Ok(times) => self.found.ms.extend(times),
            Err(error) if self.rival.is_elsewhere() => self.failure = Some(format!("{error:#}")),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Answers first, then times. A separate process that fails is left out, and a note says why.
pub(crate) fn measure<P>(
    place: &mut P,
    op: Op,
    rivals: Vec<&mut dyn Rival<P>>,
    plan: &Plan,
    note: &mut dyn FnMut(String),
) -> Result<Vec<Times>> {
    let mut players = Vec::new();
    for rival in rivals {
        match check(rival, place, op) {
            Ok(norm_error) => players.push(Player::new(rival, norm_error)),
            Err(error) if rival.is_elsewhere() => {
                note(format!(
                    "{}: {} is not right: {error:#}",
                    rival.name(),
                    op.name()
                ));
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("{} of {} is not right", op.name(), rival.name()));
            }
        }
    }
    for player in &mut players {
        let question = player.rival.question(place, op);
        player.rival.prepare(place, &question)?;
    }
    take_turns(place, &mut players, plan)?;
    for player in &players {
        if let Some(failure) = &player.failure {
            note(format!("{}: {}: {failure}", player.found.name, op.name()));
        }
    }
    let found = players.into_iter().map(|player| player.found);
    Ok(found.filter(|times| !times.ms.is_empty()).collect())
}

/// Rivals take turns, and the first of each round changes.
fn take_turns<P>(place: &mut P, players: &mut [Player<P>], plan: &Plan) -> Result<()> {
    for player in players.iter_mut() {
        let fewer = if player.is_pasted() {
            plan.per_paste_in
        } else {
            1
        };
        player.turn(place, plan.warm_ups.div_ceil(fewer))?;
        player.found.ms.clear();
    }
    for round in 0..plan.rounds {
        let is_late = plan.deadline.is_some_and(|end| Instant::now() > end);
        if is_late && round >= LEAST_ROUNDS {
            break;
        }
        let fastest = players.iter().map(Player::fastest);
        let fastest = fastest.fold(f64::INFINITY, f64::min);
        for turn in 0..players.len() {
            let player = &mut players[(round + turn) % players.len()];
            if player.takes_part(round, fastest, plan) {
                player.turn(place, plan.calls)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    /// Takes this many milliseconds, or fails if they are NaN; the place counts calls.
    struct Takes(&'static str, f64);

    impl Rival<usize> for Takes {
        fn name(&self) -> &str {
            self.0
        }

        fn question(&self, _: &usize, op: Op) -> Question {
            Question::new::<f32>(&[vec![3]], false).about(op)
        }

        fn answer(&mut self, _: &mut usize, _: &Question) -> Result<Option<Answer>> {
            Ok(None)
        }

        fn prepare(&mut self, _: &mut usize, _: &Question) -> Result<()> {
            Ok(())
        }

        fn time(&mut self, place: &mut usize, calls: usize) -> Result<Vec<f64>> {
            *place += calls;
            if self.1.is_nan() {
                bail!("no memory");
            }
            Ok(vec![self.1; calls])
        }

        fn is_elsewhere(&self) -> bool {
            self.1.is_nan()
        }
    }

    fn times(rivals: &mut [Takes], plan: &Plan) -> Result<(Vec<usize>, Vec<String>, usize)> {
        let mut notes = Vec::new();
        let mut calls = 0;
        let rivals = rivals
            .iter_mut()
            .map(|rival| rival as &mut dyn Rival<usize>);
        let rivals = rivals.collect();
        let mut note = |note| notes.push(note);
        let timed = measure(&mut calls, Op::TotalNorm, rivals, plan, &mut note)?;
        Ok((timed.iter().map(|one| one.ms.len()).collect(), notes, calls))
    }

    #[test]
    fn turns_are_equal_and_the_slow_and_the_pasted_have_fewer() -> Result<()> {
        let mut rivals = [
            Takes("paste-in", 1.0),
            Takes("b", 20.0),
            Takes("c", PATIENCE_MS + 1.0),
        ];
        let mut plan = Plan::new(11);
        plan.calls = 2;
        plan.spares_slow = true;
        assert_eq!(times(&mut rivals, &plan)?.0, [22, 6, 2]);
        (plan.spares_slow, plan.per_paste_in) = (false, 5);
        assert_eq!(times(&mut rivals, &plan)?.0, [6, 22, 22]);
        plan.deadline = Some(Instant::now());
        plan.warm_ups = 10;
        let (found, _, calls) = times(&mut rivals, &plan)?;
        assert_eq!((found, calls), (vec![2, 6, 6], 36));
        Ok(())
    }

    #[test]
    fn a_process_that_fails_is_noted_and_left_out() -> Result<()> {
        let mut rivals = [Takes("a", 1.0), Takes("b", f64::NAN)];
        let (found, notes, _) = times(&mut rivals, &Plan::new(3))?;
        assert_eq!((found, notes.len()), (vec![3], 1));
        assert_eq!(notes[0], "b: total_norm: no memory");
        Ok(())
    }
}
