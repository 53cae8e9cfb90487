//! Faults that tests plant on purpose, to prove that the crash tests would find them. Nothing of this is in a build
//! that is no test.

/// One wrong order of writes.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The `.vmx` names the redo logs before the record that decides is durable.
    VmxBeforeRecord,
    /// A redo log's descriptor is deleted before the flip is durable.
    RedoDeletedBeforeFlip,
    /// The job record does not say that the redo logs are prepared when the cut is decided.
    JobNotPrepared,
    /// One pool of a cut does not make its leg durable before the cut is decided.
    LegNotSettled,
    /// The redo logs are made before the job record names them.
    RedoBeforeJob,
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
