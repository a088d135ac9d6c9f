//! What a log does at each step, now and then, and at the end.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use candle_grad_clip::StepRecord;

use super::{RunLog, Waiting};
use crate::error::{Error, Result};
use crate::folder;
use crate::progress::Display;
use crate::rows::MetricsRow;
use crate::run_info::State;
use crate::run_page;

/// The time between two flushes of the files.
const FLUSH: Duration = Duration::from_secs(2);

/// Writing pages takes at most one part in so many of the time.
const PAGE_SHARE: u32 = 100;

impl RunLog {
    /// The number under which a report is logged.
    pub(super) fn number(&mut self, reported: u64) -> Result<u64> {
        let numbering = &mut self.numbering;
        if let Some(resumed) = numbering.resumed.take()
            && reported == 1
        {
            numbering.offset = resumed;
        }
        let step = reported + numbering.offset;
        let last = std::mem::replace(&mut numbering.last, step);
        if step <= last {
            let error = Error::StepNotRising { step, last };
            if self.files.is_strict() {
                numbering.last = last;
                return Err(error);
            }
            if !std::mem::replace(&mut numbering.has_warned, true) {
                self.files.warn(error.to_string());
            }
        }
        Ok(step)
    }

    pub(super) fn drain(&mut self, may_wait: bool) -> Result<()> {
        while let Some(first) = self.waiting.front()
            && (may_wait || first.report.is_ready())
        {
            if let Some(first) = self.waiting.pop_front() {
                self.log(&first)?;
            }
        }
        Ok(())
    }

    fn log(&mut self, waiting: &Waiting) -> Result<()> {
        let Waiting { step, loss, .. } = *waiting;
        let record = waiting.report.record()?;
        let row = MetricsRow::new(record, step, loss, waiting.limit, waiting.seconds);
        self.files.metrics(&row)?;
        self.history.missing(&record.missing_grads);
        self.history.step(row);
        let points = [
            ("loss/train", loss),
            ("grad/total_norm", Some(record.total_norm)),
            ("grad/clipped_norm", Some(record.clipped_norm)),
            ("grad/clip_coef", Some(record.clip_coef)),
            (
                "grad/clipped_fraction",
                Some(self.history.norms.clipped_fraction()),
            ),
        ];
        let there = |(tag, value): (_, Option<f64>)| value.map(|value| (tag, value));
        self.files
            .points(step, points.into_iter().filter_map(there))?;
        self.log_param_norms(step, record)
    }

    fn log_param_norms(&mut self, step: u64, record: &StepRecord) -> Result<()> {
        if record.param_norms.is_empty() {
            return Ok(());
        }
        let missing: HashSet<&str> = record.missing_grads.iter().map(String::as_str).collect();
        let norms = record.param_norms.iter();
        let norm =
            |(name, norm): &'_ (String, f64)| Some(*norm).filter(|_| !missing.contains(&**name));
        let named = norms.clone().map(|named| (&*named.0, norm(named)));
        let rows = self.history.param_norms.add(step, named);
        self.files.param_norms(&rows)?;
        if self.with_param_norm_events {
            let tagged =
                |named: &(String, f64)| Some((format!("grad_norm/{}", named.0), norm(named)?));
            let tagged: Vec<_> = norms.filter_map(tagged).collect();
            let points = tagged.iter().map(|(tag, norm)| (&**tag, *norm));
            self.files.points(step, points)?;
        }
        Ok(())
    }

    /// What is due after a step.
    pub(super) fn now_and_then(&mut self) -> Result<()> {
        let now = Instant::now();
        if now >= self.next_flush {
            self.next_flush = now + FLUSH;
            self.files.flush()?;
        }
        if let Some(interval) = self.page_interval
            && now >= self.next_page
        {
            let outcome = self.write_page();
            let end = Instant::now();
            self.next_page = end + interval.max((end - now) * PAGE_SHARE);
            self.files.settle_page(outcome)?;
        }
        let steps = self.history.steps - self.clock.steps_before;
        let speed = steps as f64 / self.clock.start.elapsed().as_secs_f64();
        let new = || Display::new(self.progress, &folder::name(&self.folder));
        let display = self.display.get_or_insert_with(new);
        for warning in self.files.take_warnings() {
            display.warn(&format!("warning: {warning}"));
        }
        display.step(&self.history, self.info.total_steps, Some(speed));
        Ok(())
    }

    fn write_page(&self) -> Result<()> {
        let path = self.folder.join(folder::PAGE);
        let page = run_page::page(
            &folder::name(&self.folder),
            &self.info,
            &self.history,
            self.clock.seconds(),
        );
        page.write(&path).map_err(Error::io("write", &path))
    }

    pub(super) fn write_info(&mut self) -> Result<()> {
        let outcome = self.info.write(&self.folder);
        self.files.settle_page(outcome)
    }

    /// Writes all that is left, whatever fails. The first error.
    pub(super) fn end(&mut self, state: State) -> Result<()> {
        if std::mem::replace(&mut self.is_ended, true) {
            return Ok(());
        }
        let drained = self.drain(true);
        let rows = self.history.param_norms.close();
        let param_norms = self.files.param_norms(&rows);
        let flushed = self.files.flush();
        self.info.state = state;
        let info = self.write_info();
        let page = self.write_page();
        let page = self.files.settle_page(page);
        if let Some(display) = &mut self.display {
            for warning in self.files.take_warnings() {
                display.warn(&format!("warning: {warning}"));
            }
            display.end(&self.history, self.info.total_steps);
        }
        drained.and(param_norms).and(flushed).and(info).and(page)
    }
}
