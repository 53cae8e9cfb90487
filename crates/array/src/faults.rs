//! Faults that tests plant on purpose, to prove that the crash tests would find them. Nothing of this is in a build
//! that is no test.

/// One wrong order of writes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// A journal record is written without flushing the data that it speaks of.
    NoFlushBeforeJournal,
    /// A freed grain is given out again before the record that frees it is durable.
    ReuseAtOnce,
    /// A map change enters the journal's batch before its data was written.
    MapBeforeData,
    /// One pool of a cut does not make its leg durable before the cut is decided.
    LegNotPrepared,
    /// A copied block is overwritten before its mark is durable.
    CopiedUnmarked,
    /// A freed grain is punched before the record that frees it is durable.
    PunchAtOnce,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Plants a fault on this thread, or takes it away.
#[cfg(test)]
pub(crate) fn plant(fault: Option<Fault>) {
    PLANTED.with(|p| p.set(fault));
}

/// Some fault is planted here: what fails is meant to.
#[cfg(test)]
pub(crate) fn any_planted() -> bool {
    PLANTED.with(|p| p.get().is_some())
}

/// This fault is planted here.
#[cfg(test)]
pub(crate) fn planted(fault: Fault) -> bool {
    PLANTED.with(|p| p.get() == Some(fault))
}

/// Never, outside tests.
#[cfg(not(test))]
#[inline]
pub(crate) const fn planted(_fault: Fault) -> bool {
    false
}
