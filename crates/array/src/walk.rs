//! Walks over the whole map of a layer, page by page: for the checker, for `inspect`, and to take a layer apart.

use std::rc::Rc;

use block::DiskError;

use crate::format::{GRAIN_PAIRS, PAGE_ENTRIES, PageKey};
use crate::map::HEIGHT;
use crate::pages::Page;
use crate::pool::Pool;

/// A page pair that a map refers to.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Node {
    /// 0 for leaves.
    pub(crate) level: u32,
    /// First leaf below it.
    pub(crate) leaf: u64,
    /// Where it lies.
    pub(crate) pair: u64,
}

/// What a walk meets, in the order of the LUN.
pub(crate) enum Seen {
    /// A page is referred to, and not read yet.
    Node(Node),
    /// A leaf.
    Leaf(Node, Rc<Page>),
    /// A page that does not lie in the pool, or among its system grains.
    Outside(Node),
    /// A page of which no copy is whole.
    Damaged(Node),
}

impl Pool {
    /// Shows every page of a layer's map to `visit`; leaves are read only if `leaves`. Damage is shown, not returned.
    pub(crate) async fn walk(
        &self,
        layer: u64,
        leaves: bool,
        visit: &mut dyn FnMut(Seen),
    ) -> Result<(), DiskError> {
        let root = self.catalog.borrow().layers.get(&layer).map_or(0, |l| l.root);
        let mut stack = Vec::new();
        if root != 0 {
            stack.push(Node { level: HEIGHT - 1, leaf: 0, pair: root });
        }
        while let Some(node) = stack.pop() {
            if !self.holds_data(node.pair / GRAIN_PAIRS) {
                visit(Seen::Outside(node));
                continue;
            }
            visit(Seen::Node(node));
            if node.level == 0 && !leaves {
                continue;
            }
            let span = (PAGE_ENTRIES as u64).pow(node.level);
            let key = PageKey { tree: layer, level: node.level, index: node.leaf / span };
            let page = match self.pages.load(&self.media, key, node.pair).await {
                Ok(page) => page,
                Err(DiskError::Medium(_)) => {
                    visit(Seen::Damaged(node));
                    continue;
                }
                Err(error) => return Err(error),
            };
            if node.level == 0 {
                visit(Seen::Leaf(node, page));
                continue;
            }
            let below = span / PAGE_ENTRIES as u64;
            // The last goes in first, so that the first comes out first.
            for slot in (0..PAGE_ENTRIES).rev().filter(|slot| page.get(*slot) != 0) {
                let leaf = node.leaf + slot as u64 * below;
                stack.push(Node { level: node.level - 1, leaf, pair: page.get(slot) });
            }
        }
        Ok(())
    }

    /// The grain lies in the pool and is none of the system's.
    pub(crate) fn holds_data(&self, grain: u64) -> bool {
        let medium = self.media.medium_of(grain).map(|number| &self.media.list[number]);
        medium.is_some_and(|m| grain - m.first >= m.reserved)
    }
}
