//! Grain tables in memory, a bounded number of 4 KiB pages of them (R12): of COWD, and of SEsparse.

use std::collections::HashMap;
use std::rc::Rc;

/// Entries in a page.
pub(crate) const PAGE_ENTRIES: u64 = 1024;
/// Bytes in a page.
pub(crate) const PAGE_BYTES: usize = PAGE_ENTRIES as usize * 4;
/// Pages in a grain table.
pub(crate) const TABLE_PAGES: u64 = super::format::TABLE_ENTRIES / PAGE_ENTRIES;

/// A quarter of a grain table, as it is in the file.
#[derive(Clone)]
pub(crate) struct Page(pub(crate) Box<[u8; PAGE_BYTES]>);

impl Page {
    pub(crate) fn empty() -> Self {
        Self(Box::new([0; PAGE_BYTES]))
    }

    /// Sector of the grain at `index`; 0 when it is not in the file.
    #[inline]
    pub(crate) fn entry(&self, index: usize) -> u32 {
        let bytes = &self.0[index * 4..index * 4 + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }

    pub(crate) fn set(&mut self, index: usize, sector: u32) {
        self.0[index * 4..index * 4 + 4].copy_from_slice(&sector.to_le_bytes());
    }
}

struct Slot {
    key: u64,
    page: Rc<Page>,
    used: bool,
}

/// A cache of pages with one bit of age ("clock"): constant work, no list to keep in order.
pub(crate) struct Cache {
    slots: Vec<Slot>,
    index: HashMap<u64, usize>,
    hand: usize,
    limit: usize,
}

impl Cache {
    /// At most `limit` pages (at least one).
    pub(crate) fn new(limit: usize) -> Self {
        Self { slots: Vec::new(), index: HashMap::new(), hand: 0, limit: limit.max(1) }
    }

    pub(crate) fn get(&mut self, key: u64) -> Option<Rc<Page>> {
        let slot = &mut self.slots[*self.index.get(&key)?];
        slot.used = true;
        Some(Rc::clone(&slot.page))
    }

    pub(crate) fn put(&mut self, key: u64, page: Rc<Page>) {
        if let Some(slot) = self.index.get(&key) {
            self.slots[*slot].page = page;
            return;
        }
        let slot = Slot { key, page, used: false };
        if self.slots.len() < self.limit {
            self.index.insert(key, self.slots.len());
            self.slots.push(slot);
            return;
        }
        while std::mem::take(&mut self.slots[self.hand].used) {
            self.hand = (self.hand + 1) % self.slots.len();
        }
        self.index.remove(&self.slots[self.hand].key);
        self.index.insert(key, self.hand);
        self.slots[self.hand] = slot;
        self.hand = (self.hand + 1) % self.slots.len();
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r12_the_cache_stays_within_its_limit_and_keeps_what_is_used() {
        let mut cache = Cache::new(8);
        for key in 0..100 {
            let mut page = Page::empty();
            page.set(7, key as u32 + 1);
            cache.put(key, Rc::new(page));
            assert!(cache.len() <= 8);
            assert!(cache.get(0).is_some(), "what was used a moment ago stays");
        }
        assert_eq!(cache.get(99).unwrap().entry(7), 100);
    }
}
