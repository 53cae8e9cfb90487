//! Who has which file of a folder open. A file that is not the top of a chain is never opened for writing (R16); a
//! mapping file is held by one, unless its disk is shared on purpose (R5).

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// How a file is held.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub enum Hold {
    /// Frozen: several may read it, nobody writes.
    Read,
    /// Written by one.
    Write,
    /// Written by several who agreed on it: bus sharing or multi-writer.
    SharedWrite,
}

/// The file is held by somebody else.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{path} is in use ({holders} for {held:?}), so it cannot be opened for {wanted:?}")]
pub struct InUse {
    /// The file.
    pub path: String,
    /// How it is held.
    pub held: Hold,
    /// By how many.
    pub holders: usize,
    /// What was asked for.
    pub wanted: Hold,
}

type Held = Rc<RefCell<HashMap<String, (Hold, usize)>>>;

/// The open files of one folder.
#[derive(Clone, Default)]
pub struct Claims {
    held: Held,
}

/// Holding a file; dropping it lets go.
pub struct Claim {
    held: Held,
    path: String,
}

impl Claims {
    /// Holds `path`, if those who hold it already allow that.
    pub fn take(&self, path: &str, wanted: Hold) -> Result<Claim, InUse> {
        let mut held = self.held.borrow_mut();
        let entry = held.entry(path.to_owned()).or_insert((wanted, 0));
        if entry.1 > 0 && (entry.0 != wanted || wanted == Hold::Write) {
            return Err(InUse { path: path.to_owned(), held: entry.0, holders: entry.1, wanted });
        }
        *entry = (wanted, entry.1 + 1);
        Ok(Claim { held: Rc::clone(&self.held), path: path.to_owned() })
    }

    /// How `path` is held, and by how many.
    pub fn holders(&self, path: &str) -> Option<(Hold, usize)> {
        self.held.borrow().get(path).copied()
    }
}

impl Claim {
    /// The file.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Held together with others who write.
    pub fn is_shared(&self) -> bool {
        self.held.borrow().get(&self.path).is_some_and(|(hold, _)| *hold == Hold::SharedWrite)
    }

    /// Holds it in another way from now on; only its one holder may change that.
    pub fn change(&self, wanted: Hold) -> Result<(), InUse> {
        let mut held = self.held.borrow_mut();
        match held.get_mut(&self.path) {
            Some((hold, 1)) => {
                *hold = wanted;
                Ok(())
            }
            other => {
                let (held, holders) = other.map_or((wanted, 0), |o| *o);
                Err(InUse { path: self.path.clone(), held, holders, wanted })
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.held.borrow_mut();
        if let Some((_, holders)) = held.get_mut(&self.path) {
            *holders -= 1;
            if *holders == 0 {
                held.remove(&self.path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r5_a_mapping_file_is_held_by_one_unless_shared() {
        let claims = Claims::default();
        let one = claims.take("/d-rdm.vmdk", Hold::Write).unwrap();
        assert!(claims.take("/d-rdm.vmdk", Hold::Write).is_err());
        assert!(claims.take("/d-rdm.vmdk", Hold::SharedWrite).is_err());
        drop(one);
        let _a = claims.take("/d-rdm.vmdk", Hold::SharedWrite).unwrap();
        let _b = claims.take("/d-rdm.vmdk", Hold::SharedWrite).unwrap();
        let refused = claims.take("/d-rdm.vmdk", Hold::Write).err().unwrap();
        assert_eq!((refused.holders, refused.held), (2, Hold::SharedWrite));
    }

    #[test]
    fn r16_what_is_read_by_several_is_written_by_none() {
        let claims = Claims::default();
        let one = claims.take("/base.vmdk", Hold::Read).unwrap();
        let two = claims.take("/base.vmdk", Hold::Read).unwrap();
        assert!(claims.take("/base.vmdk", Hold::Write).is_err());
        assert!(one.change(Hold::Write).is_err());
        drop(two);
        one.change(Hold::Write).unwrap();
        assert!(claims.take("/base.vmdk", Hold::Read).is_err());
        drop(one);
        assert_eq!(claims.holders("/base.vmdk"), None);
    }
}
