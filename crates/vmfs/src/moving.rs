//! From one directory into another: two writes decide, so a power loss may leave both names.

use crate::Error;
use crate::descriptor::Node;
use crate::directory::RawEntry;
use crate::format::{Corrupt, EntryName, Expected, FdAddress, InodeKind};
use crate::names::entry_of;
use crate::volume::Inner;
use std::rc::Rc;

/// Directories within each other that are followed upwards.
const DEPTH_MAX: usize = 1000;

impl Inner {
    /// The links are two while both names are there: too many is what a power loss may leave, never too few.
    pub async fn move_between(
        &self,
        source: &Rc<Node>,
        raw: &RawEntry,
        target: &Rc<Node>,
        name: &EntryName,
        node: &Rc<Node>,
        replaced: Option<&(RawEntry, Rc<Node>)>,
    ) -> Result<(), Error> {
        self.change_links(node, 1)?;
        let entry = entry_of(node, name.as_str());
        let added = match replaced {
            None => self.append(target, entry, false).await,
            Some((old, _)) => self.replace_entry(target, old.index, entry).await,
        };
        if let Err(error) = added {
            self.change_links(node, -1)?;
            return Err(error);
        }
        self.settle_pending().await?;
        let mut entries = self.raw_entries(source).await?;
        entries.swap_remove(raw.index as usize);
        match self.rewrite(source, entries).await {
            Err(Error::NoSpace { .. }) => self.blank_entry(source, raw.index).await?,
            other => other?,
        }
        self.change_links(node, -1)
    }

    /// The new name first, then "..", then the old name goes. Whichever of two names ".." does not confirm is the one
    /// that a repair takes away: before ".." changed that is the new one, afterwards the old one.
    pub async fn move_directory(
        &self,
        source: &Rc<Node>,
        raw: &RawEntry,
        target: &Rc<Node>,
        name: &EntryName,
        node: &Rc<Node>,
        to: &str,
    ) -> Result<(), Error> {
        if self.is_below(target, node).await? {
            return Err(Error::BadPath { path: to.into(), why: "it lies in the directory that moves" });
        }
        let added = self.raw_entries(target).await?.len() as u64;
        self.append(target, entry_of(node, name.as_str()), true).await?;
        if let Err(error) = self.replace_entry(node, 1, entry_of(target, "..")).await {
            // Nothing is decided yet: the new name goes again.
            self.blank_entry(target, added).await?;
            self.change_links(target, -1)?;
            return Err(error);
        }
        self.settle_pending().await?;
        let mut entries = self.raw_entries(source).await?;
        entries.swap_remove(raw.index as usize);
        match self.rewrite(source, entries).await {
            Err(Error::NoSpace { .. }) => self.blank_entry(source, raw.index).await?,
            other => other?,
        }
        self.change_links(source, -1)
    }

    /// `inner` is `outer`, or lies somewhere in it.
    async fn is_below(&self, inner: &Rc<Node>, outer: &Rc<Node>) -> Result<bool, Error> {
        let mut here = Rc::clone(inner);
        for _ in 0..DEPTH_MAX {
            if here.address.get() == outer.address.get() {
                return Ok(true);
            }
            if here.address.get() == FdAddress::ROOT {
                return Ok(false);
            }
            let entries = self.raw_entries(&here).await?;
            let above = entries.get(1).and_then(|entry| FdAddress::decode(entry.fd.get()));
            let above = above.ok_or(Corrupt {
                what: "\"..\" of a directory",
                at: here.at.get(),
                found: entries.len() as u64,
                expected: Expected::Words("an entry that leads to a directory"),
            })?;
            here = self.node(above, None, here.at.get()).await?;
            self.expect(&here, "..", InodeKind::Directory)?;
        }
        Err(Error::Unsupported("directories within each other this deep"))
    }
}
