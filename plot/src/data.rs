//! From points to what can be drawn: gaps split lines, long lines are thinned, the panel's edge cuts.

use std::ops::Range;

use super::range::{position, within};

type Point = (f64, f64);

/// A connected stretch of a line, in positions on the axes.
pub(super) type Piece = Vec<Point>;

/// More points than twice this in one piece are thinned to the highest and lowest of each stretch: a
/// picture has fewer columns.
const STRETCHES: usize = 1000;

/// The pieces of a line that lie in the `shown` range of y.
pub(super) fn pieces(points: &[Point], x_log: bool, shown: &Range<f64>, y_log: bool) -> Vec<Piece> {
    let positions: Vec<_> = points
        .iter()
        .map(|&(px, py)| Some((position(px, x_log)?, position(py, y_log)?)))
        .collect();
    positions
        .split(Option::is_none)
        .map(|run| thin(&run.iter().flatten().copied().collect::<Vec<_>>()))
        .flat_map(|piece| cut(&piece, shown))
        .collect()
}

fn thin(piece: &[Point]) -> Piece {
    if piece.len() <= 2 * STRETCHES {
        return piece.to_vec();
    }
    let extremes = |stretch: &[Point]| {
        let by_y = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
        let mut pair = [
            stretch.iter().min_by(by_y).copied(),
            stretch.iter().max_by(by_y).copied(),
        ];
        pair.sort_by(|a, b| a.map_or(0.0, |p| p.0).total_cmp(&b.map_or(0.0, |p| p.0)));
        pair
    };
    piece
        .chunks(piece.len().div_ceil(STRETCHES))
        .flat_map(extremes)
        .flatten()
        .collect()
}

/// Cuts a piece at the top and bottom edge, so that a line leaves the panel where it crosses it.
fn cut(piece: &[Point], shown: &Range<f64>) -> Vec<Piece> {
    if let [point] = piece {
        return if within(shown, point.1) {
            vec![vec![*point]]
        } else {
            Vec::new()
        };
    }
    let mut done: Vec<Piece> = Vec::new();
    for pair in piece.windows(2) {
        let Some((from, to)) = visible(pair[0], pair[1], shown) else {
            continue;
        };
        match done.last_mut() {
            Some(open) if open.last() == Some(&from) => open.push(to),
            _ => done.push(vec![from, to]),
        }
    }
    done
}

/// The part of a segment between the edges.
fn visible(from: Point, to: Point, shown: &Range<f64>) -> Option<(Point, Point)> {
    let rise = to.1 - from.1;
    if rise == 0.0 {
        return within(shown, from.1).then_some((from, to));
    }
    let (low, high) = ((shown.start - from.1) / rise, (shown.end - from.1) / rise);
    let (enter, leave) = (low.min(high), low.max(high));
    if enter > 1.0 || leave < 0.0 {
        return None;
    }
    let at = |share: f64| {
        (
            from.0 + share * (to.0 - from.0),
            (from.1 + share * rise).clamp(shown.start, shown.end),
        )
    };
    let first = if enter <= 0.0 { from } else { at(enter) };
    let last = if leave >= 1.0 { to } else { at(leave) };
    Some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_without_a_position_make_gaps() {
        let points = [
            (1.0, 1.0),
            (2.0, f64::NAN),
            (3.0, 3.0),
            (4.0, 0.0),
            (5.0, 1.0),
            (6.0, 2.0),
        ];
        let found = pieces(&points, false, &(-1.0..1.0), true);
        let last = vec![(5.0, 0.0), (6.0, 2f64.log10())];
        assert_eq!(found, [vec![(1.0, 0.0)], vec![(3.0, 3f64.log10())], last]);
    }

    #[test]
    fn a_line_leaves_and_enters_at_the_edge() {
        let piece = [(0.0, 0.0), (1.0, 2.0), (2.0, 2.0), (3.0, -2.0), (4.0, 0.0)];
        let expected = [
            vec![(0.0, 0.0), (0.5, 1.0)],
            vec![(2.25, 1.0), (2.75, -1.0)],
            vec![(3.5, -1.0), (4.0, 0.0)],
        ];
        assert_eq!(cut(&piece, &(-1.0..1.0)), expected);
    }

    #[test]
    fn thinning_keeps_extremes_and_order() {
        let mut points: Vec<_> = (0..100_000).map(|i| (f64::from(i), 0.0)).collect();
        points[41_234].1 = 7.0;
        points[77_777].1 = -7.0;
        let thinned = thin(&points);
        assert!(thinned.len() <= 2 * STRETCHES);
        assert!(thinned.contains(&(41_234.0, 7.0)) && thinned.contains(&(77_777.0, -7.0)));
        assert!(thinned.is_sorted_by(|a, b| a.0 <= b.0));
    }
}
