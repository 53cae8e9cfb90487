//! The fault that tests plant on purpose, to prove that the crash tests would find it. Nothing of this is in a build that
//! is no test.

#[cfg(test)]
thread_local! {
    static POINTER_BEFORE_BIT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Makes this thread's volumes write pointers before the bitmap bits of what they point to, or takes that back.
#[cfg(test)]
pub(crate) fn plant(on: bool) {
    POINTER_BEFORE_BIT.with(|flag| flag.set(on));
}

/// It is planted here.
#[cfg(test)]
pub(crate) fn pointer_before_bit() -> bool {
    POINTER_BEFORE_BIT.with(std::cell::Cell::get)
}

/// Never, outside tests.
#[cfg(not(test))]
#[inline]
pub(crate) const fn pointer_before_bit() -> bool {
    false
}
