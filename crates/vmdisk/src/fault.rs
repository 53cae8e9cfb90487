//! Faults that tests plant on purpose, to prove that the crash tests would find them. Nothing of this is in a build
//! that is no test.

/// One wrong order of writes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// COWD: grain tables are written before their data is durable.
    TableBeforeData,
    /// Commit: the redo log is deleted before the flip is durable.
    RedoDeletedBeforeFlip,
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
