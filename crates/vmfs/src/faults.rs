//! Planted faults: they prove that the crash tests see what they are there to see. Never set outside tests.

use std::cell::Cell;

thread_local! {
    static POINTER_BEFORE_BIT: Cell<bool> = const { Cell::new(false) };
}

/// Makes this thread's volumes write pointers before the bitmap bits of what they point to.
#[doc(hidden)]
pub fn plant_pointer_before_bit(on: bool) {
    POINTER_BEFORE_BIT.with(|flag| flag.set(on));
}

pub(crate) fn pointer_before_bit() -> bool {
    POINTER_BEFORE_BIT.with(Cell::get)
}
