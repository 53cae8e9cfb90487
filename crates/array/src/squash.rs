//! Squash: grains of a top layer that hold only some of their blocks are completed in the background.
//!
//! The blocks that are missing come from below and are marked *copied*: no change for anybody who asks what changed.
//! A grain is squashed when it was left alone for a while and holds at least half of its blocks, so that no more is
//! copied than guests wrote; it then reads in one piece, and nothing has to be copied when what lies below goes. Below
//! a boundary every such grain is completed, because that frees the grain below it (`boundary.rs`).
//!
//! No grain is taken for it. Still it is the first thing to stop in a pool that fills up, and it yields: while guests are
//! at work only grains above a boundary are completed, a few in each step of the background. (The first overwrite of a
//! copied block waits for its mark: where a guest is just writing, copying first would make it slower.)

use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasherDefault;

use block::DiskError;

use crate::boundary::{blocks_of, copied, open_blocks};
use crate::format::{Entry, GRAIN_BLOCKS};
use crate::map::leaf_of;
use crate::pages::Mix;
use crate::pool::Pool;
use crate::space::Purpose;

/// Grains remembered, at most; more than that waits for the next write to them.
const MOST_NOTED: usize = 1 << 16;
/// Idle steps of the background for which a grain must be left alone: about a second in the daemon.
const REST_STEPS: u32 = 50;
/// Grains that one step looks at, at most.
const MOST_LOOKED_AT: usize = 1024;

/// Grains that guests wrote to: layer and grain of the LUN.
pub(crate) struct Noted {
    young: RefCell<HashSet<(u64, u64), BuildHasherDefault<Mix>>>,
    due: RefCell<VecDeque<(u64, u64)>>,
    rested: Cell<u32>,
    /// See `REST_STEPS`; tests wait less.
    pub(crate) rest: Cell<u32>,
    /// Guests at work stop it, but for what frees room; tests let them meet.
    pub(crate) patient: Cell<bool>,
}

impl Noted {
    pub(crate) fn new() -> Self {
        Self {
            young: RefCell::default(),
            due: RefCell::default(),
            rested: Cell::new(0),
            rest: Cell::new(REST_STEPS),
            patient: Cell::new(true),
        }
    }

    /// Nothing to look at.
    pub(crate) fn is_empty(&self) -> bool {
        self.due.borrow().is_empty() && self.young.borrow().is_empty()
    }

    /// The next grain that was left alone long enough.
    fn next(&self) -> Option<(u64, u64)> {
        let young = self.young.borrow();
        let mut due = self.due.borrow_mut();
        while let Some(next) = due.pop_front() {
            if !young.contains(&next) {
                return Some(next);
            }
        }
        None
    }

    /// Grains have come to rest and are not looked at yet.
    pub(crate) fn is_due(&self) -> bool {
        !self.due.borrow().is_empty()
    }

    /// One more idle step has passed.
    fn grow_older(&self) {
        self.rested.set(self.rested.get() + 1);
        if self.rested.get() >= self.rest.get() {
            self.all_due();
        }
    }

    /// Whatever was noted so far has come to rest.
    pub(crate) fn all_due(&self) {
        self.rested.set(0);
        let mut list: Vec<(u64, u64)> = self.young.borrow_mut().drain().collect();
        list.sort_unstable();
        self.due.borrow_mut().extend(list);
    }
}

impl Pool {
    /// A guest changed an entry of a top layer with something below it: to be looked at when it has come to rest.
    pub(crate) fn note(&self, layer: u64, grain: u64, entry: Entry) {
        let boundary = self.stack_below(layer).is_some();
        if !boundary && (open_blocks(entry) == 0 || entry.grain() == 0) {
            return;
        }
        let mut young = self.noted.young.borrow_mut();
        if young.len() < MOST_NOTED {
            young.insert((layer, grain));
        } else if boundary {
            self.pass_again(layer);
        }
    }

    /// Looks at noted grains that have come to rest; copies at most `most`. False: nothing is noted.
    pub(crate) async fn squash_step(&self, most: usize, guests: bool) -> Result<bool, DiskError> {
        let idle = !guests || !self.noted.patient.get();
        if self.noted.is_empty() {
            return Ok(false);
        }
        if !self.noted.is_due() {
            if idle || self.has_boundaries() {
                self.noted.grow_older();
            }
            return Ok(true);
        }
        let (mut touched, mut looked_at) = (0, 0);
        while touched < most
            && looked_at < MOST_LOOKED_AT
            && let Some((layer, grain)) = self.noted.next()
        {
            looked_at += 1;
            if !idle && self.stack_below(layer).is_none() {
                self.noted.young.borrow_mut().insert((layer, grain)); // later
                continue;
            }
            while self.batch_is_full() {
                self.commit().await?;
            }
            touched += usize::from(match self.stack_below(layer) {
                Some(stack) => self.give_up_grain(layer, &stack, grain).await?,
                None => self.squash_grain(layer, grain).await?,
            });
        }
        self.commit().await?;
        Ok(true)
    }

    /// Completes one grain of a top layer. True when something was copied.
    async fn squash_grain(&self, layer: u64, grain: u64) -> Result<bool, DiskError> {
        let Some(lun) = self.lun_with_top(layer) else { return Ok(false) };
        if !self.space.has_room(Purpose::Background) {
            return Ok(false);
        }
        let _locked = lun.lock_blocks(grain, 0..GRAIN_BLOCKS).await;
        let (number, slot) = leaf_of(grain);
        let Some(leaf) = self.leaf(layer, number).await? else { return Ok(false) };
        let (entry, layers) = (Entry(leaf.get(slot)), lun.layers());
        let (Some((top, below)), open) = (layers.split_first(), open_blocks(entry)) else { return Ok(false) };
        if *top != layer || entry.grain() == 0 || open == 0 || open.count_ones() > GRAIN_BLOCKS as u32 / 2 {
            return Ok(false);
        }
        let _under_way = self.space.under_way();
        let mut sources = [0; GRAIN_BLOCKS];
        self.sources(below, grain, open, &mut sources).await?;
        let found: Vec<usize> = blocks_of(open).filter(|block| sources[*block] != 0).collect();
        for run in found.chunk_by(|a, b| sources[*a] == sources[*b]) {
            self.copy_blocks(sources[run[0]], entry.grain(), run).await?;
        }
        if found.is_empty() || leaf.get(slot) != entry.0 {
            return Ok(false);
        }
        let mask = found.iter().fold(0, |mask, block| mask | 1 << block);
        self.change_entry(&leaf, grain, copied(entry, mask));
        Ok(true)
    }
}
