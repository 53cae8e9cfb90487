//! One client in transmission: what was agreed with it, and what it may hold.

use std::rc::Rc;

use super::export::{Export, Stay};
use super::outgoing::Outgoing;
use super::status::Selected;
use crate::credit::Credit;
use crate::pool::Pool;

/// One client in transmission.
pub(crate) struct Connection {
    /// Where buffers come from.
    pub pool: Rc<Pool>,
    /// Structured replies were agreed.
    pub structured: bool,
    /// Contexts were agreed, with these numbers.
    pub contexts: Vec<Selected>,
    /// Answers on their way.
    pub outgoing: Outgoing,
    /// What the client may hold.
    pub credit: Rc<Credit>,
    /// The export and the stay on it.
    pub stay: Stay,
}

impl Connection {
    /// The export.
    pub fn export(&self) -> &Rc<Export> {
        self.stay.export()
    }
}
