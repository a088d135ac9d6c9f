//! A series of any length in bounded memory.

/// Enough for a bucket a pixel on a wide screen.
const MOST_BUCKETS: usize = 2_000;

/// A curve that grows by one point after the other and keeps what a picture needs.
///
/// Up to a number of points (2,000, unless [`Curve::with_buckets`] says otherwise) each of them is
/// kept. Beyond it, neighbours share a bucket. A bucket keeps its first, smallest, largest and last
/// point with their x, and the first NaN, the first infinity and the first negative infinity in it.
/// So no extreme is lost, however long the curve.
///
/// ```
/// use candle_grad_clip_log::page::Curve;
///
/// let mut loss = Curve::new();
/// for step in 0..100_000 {
///     loss.push(f64::from(step), if step == 77_777 { 9.0 } else { 1.0 });
/// }
/// assert!(loss.points().len() <= 4 * 2_000);
/// assert!(loss.points().contains(&(77_777.0, 9.0)));
/// ```
#[derive(Debug, Clone)]
pub struct Curve {
    buckets: Vec<Bucket>,
    most_buckets: usize,
    /// How many points a bucket takes: a power of 2.
    width: u64,
    /// How many points the last bucket has.
    filled: u64,
    len: u64,
    last: Option<(f64, f64)>,
}

impl Curve {
    /// An empty curve of up to 2,000 buckets.
    #[must_use]
    pub fn new() -> Self {
        Self::with_buckets(MOST_BUCKETS)
    }

    /// An empty curve of up to `most` buckets (at least 2), for many curves in one small file.
    #[must_use]
    pub fn with_buckets(most: usize) -> Self {
        Self {
            buckets: Vec::new(),
            most_buckets: most.max(2),
            width: 1,
            filled: 0,
            len: 0,
            last: None,
        }
    }

    /// Appends a point. An x that is below the one before or not finite counts as the one before.
    pub fn push(&mut self, x: f64, y: f64) {
        let before = self.last.map(|(x, _)| x);
        let x = if x.is_finite() {
            x.max(before.unwrap_or(x))
        } else {
            before.unwrap_or(0.0)
        };
        let order = self.len;
        let bucket = Bucket::of(Point { order, x, y });
        self.last = Some((x, y));
        self.len += 1;
        if self.filled < self.width
            && let Some(last) = self.buckets.last_mut()
        {
            last.append(bucket);
            self.filled += 1;
            return;
        }
        if self.buckets.len() >= self.most_buckets {
            self.halve();
        }
        self.buckets.push(bucket);
        self.filled = 1;
    }

    /// The points that are kept, in the order in which they came.
    #[must_use]
    pub fn points(&self) -> Vec<(f64, f64)> {
        let mut points = Vec::with_capacity(self.buckets.len());
        for bucket in &self.buckets {
            let mut kept: Vec<Point> = bucket.kept.iter().flatten().copied().collect();
            kept.sort_by_key(|point| point.order);
            kept.dedup_by_key(|point| point.order);
            points.extend(kept.iter().map(|point| (point.x, point.y)));
        }
        points
    }

    /// How many points were appended.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no point was appended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The point that was appended last.
    #[must_use]
    pub fn last(&self) -> Option<(f64, f64)> {
        self.last
    }

    /// Merges neighbours: half as many buckets, each twice as wide.
    fn halve(&mut self) {
        let mut old = std::mem::take(&mut self.buckets).into_iter();
        while let Some(mut bucket) = old.next() {
            if let Some(next) = old.next() {
                bucket.append(next);
            }
            self.buckets.push(bucket);
        }
        self.width *= 2;
    }
}

impl Default for Curve {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Clone, Copy)]
struct Point {
    order: u64,
    x: f64,
    y: f64,
}

const FIRST: usize = 0;
const SMALLEST: usize = 1;
const LARGEST: usize = 2;
const LAST: usize = 3;
const NAN: usize = 4;
const INFINITY: usize = 5;
const NEG_INFINITY: usize = 6;

/// What is kept of some points: the first four are finite.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    kept: [Option<Point>; 7],
}

impl Bucket {
    fn of(point: Point) -> Self {
        let mut kept = [None; 7];
        if point.y.is_finite() {
            kept[FIRST..=LAST].fill(Some(point));
        } else if point.y.is_nan() {
            kept[NAN] = Some(point);
        } else if point.y > 0.0 {
            kept[INFINITY] = Some(point);
        } else {
            kept[NEG_INFINITY] = Some(point);
        }
        Self { kept }
    }

    /// Takes in what is kept of later points.
    fn append(&mut self, later: Self) {
        for (place, (mine, other)) in self.kept.iter_mut().zip(later.kept).enumerate() {
            let Some(new) = other else { continue };
            let replaces = mine.is_none_or(|old| match place {
                SMALLEST => new.y < old.y,
                LARGEST => new.y > old.y,
                LAST => true,
                _ => false,
            });
            if replaces {
                *mine = Some(new);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn curve(points: &[(f64, f64)], most: usize) -> Curve {
        let mut curve = Curve::with_buckets(most);
        for (x, y) in points {
            curve.push(*x, *y);
        }
        curve
    }

    /// Equal bits, so that NaN equals NaN.
    fn bits(points: &[(f64, f64)]) -> Vec<(u64, u64)> {
        points
            .iter()
            .map(|(x, y)| (x.to_bits(), y.to_bits()))
            .collect()
    }

    fn value() -> impl Strategy<Value = f64> {
        prop_oneof![
            20 => -1e3..1e3,
            1 => Just(f64::NAN),
            1 => Just(f64::INFINITY),
            1 => Just(f64::NEG_INFINITY),
        ]
    }

    proptest! {
        #[test]
        fn is_exact_while_short(ys in prop::collection::vec(value(), 0..16)) {
            let points: Vec<_> = ys.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            prop_assert_eq!(bits(&curve(&points, 16).points()), bits(&points));
        }

        #[test]
        fn keeps_extremes_of_each_bucket(
            ys in prop::collection::vec(value(), 0..400),
            most in 2..12_usize,
        ) {
            let points: Vec<_> = ys.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            let curve = curve(&points, most);
            let kept = curve.points();
            prop_assert!(curve.buckets.len() <= most);
            prop_assert_eq!(curve.len(), ys.len() as u64);
            prop_assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
            // Each bucket on its own, so also any range of buckets.
            let starts = curve.buckets.iter().map(|bucket| {
                bucket.kept.iter().flatten().map(|point| point.order).min().unwrap_or(0) as usize
            });
            let mut edges: Vec<usize> = starts.collect();
            edges.push(ys.len());
            for edge in edges.windows(2) {
                let of = |points: &[(f64, f64)], keep: fn(&f64) -> bool| {
                    let inside = |x: f64| x >= edge[0] as f64 && x < edge[1] as f64;
                    let ys = points.iter().filter(|(x, _)| inside(*x)).map(|(_, y)| *y);
                    let ys: Vec<f64> = ys.filter(keep).collect();
                    let smallest = ys.iter().copied().reduce(f64::min);
                    (smallest, ys.iter().copied().reduce(f64::max), ys.first().copied())
                };
                prop_assert_eq!(of(&kept, |y| y.is_finite()), of(&points, |y| y.is_finite()));
                for odd in [f64::is_nan as fn(f64) -> bool, |y| y == f64::INFINITY, |y| {
                    y == f64::NEG_INFINITY
                }] {
                    let first = |points: &[(f64, f64)]| {
                        let inside = |x: f64| x >= edge[0] as f64 && x < edge[1] as f64;
                        points.iter().find(|(x, y)| inside(*x) && odd(*y)).map(|(x, _)| *x)
                    };
                    prop_assert_eq!(first(&kept), first(&points));
                }
            }
        }

        #[test]
        fn x_never_goes_back(xs in prop::collection::vec(value(), 0..100)) {
            let points: Vec<_> = xs.iter().map(|x| (*x, 1.0)).collect();
            let kept = curve(&points, 8).points();
            prop_assert!(kept.iter().all(|(x, _)| x.is_finite()));
            prop_assert!(kept.windows(2).all(|pair| pair[0].0 <= pair[1].0));
        }
    }

    #[test]
    fn stays_small_over_a_million_points() {
        let mut curve = Curve::new();
        for step in 0..1_000_000 {
            curve.push(f64::from(step), f64::from(step % 97));
        }
        assert!((1_000..=2_000).contains(&curve.buckets.len()));
        assert!(curve.points().len() <= 8_000);
        assert_eq!(curve.points()[0], (0.0, 0.0));
        assert_eq!(curve.points().last().copied(), curve.last());
    }
}
