//! What a pool must hold after power failed at some point of a story.

use std::cell::RefCell;
use std::rc::Rc;

use block::crash::Witness;
use block::{Disk, DiskError, Extents, Generation, Image, Sector};

use super::{content, differences};
use crate::Pool;

/// From when to when, on the log's clock: it had not begun at the first, it was answered at the second.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Span {
    /// Nothing of it is there if power failed here or earlier.
    pub(crate) begin: usize,
    /// All of it is there if power failed here or later.
    pub(crate) end: usize,
}

/// A stretch of a LUN's life with one history: a revert begins another one.
pub(crate) struct Era {
    pub(crate) since: Span,
    pub(crate) witness: Rc<Witness>,
}

/// A LUN that was made during the story.
pub(crate) struct LunLife {
    pub(crate) name: String,
    pub(crate) eras: Vec<Era>,
    /// When it went away (into the trash or for good), and when it came back.
    pub(crate) absences: Vec<(Span, Option<Span>)>,
    /// Its length from then on, in sectors.
    pub(crate) sizes: Vec<(Span, u64)>,
    /// Whether somebody stands on it from then on.
    pub(crate) claims: Vec<(Span, bool)>,
    /// What a revert left: its history and its length.
    pub(crate) abandoned: Option<(Rc<Witness>, u64)>,
}

impl LunLife {
    pub(crate) fn new(name: &str, era: Era, sectors: u64) -> Self {
        let since = era.since;
        Self {
            name: name.to_owned(),
            eras: vec![era],
            absences: Vec::new(),
            sizes: vec![(since, sectors)],
            claims: vec![(since, false)],
            abandoned: None,
        }
    }

    /// It is there now.
    pub(crate) fn lives(&self) -> bool {
        self.absences.last().is_none_or(|(_, back)| back.is_some())
    }

    fn presence(&self, point: usize) -> (bool, bool) {
        let born = self.eras[0].since;
        let away =
            |(gone, back): &(Span, Option<Span>)| point >= gone.end && back.is_none_or(|b| point <= b.begin);
        let perhaps =
            |(gone, back): &(Span, Option<Span>)| point > gone.begin && back.is_none_or(|b| point < b.end);
        let may = point > born.begin && !self.absences.iter().any(away);
        (may, point >= born.end && !self.absences.iter().any(perhaps))
    }
}

/// What a value may be after a cut: the last change that was complete, or one that had begun.
fn possible<T: Copy>(changes: &[(Span, T)], point: usize) -> Vec<T> {
    let complete = changes.iter().rposition(|(span, _)| span.end <= point).unwrap_or(0);
    let open = changes.iter().enumerate().skip(complete);
    open.filter(|(i, (span, _))| *i == complete || span.begin < point).map(|(_, (_, value))| *value).collect()
}

/// A generation that somebody held during the story.
pub(crate) struct HoldLife {
    pub(crate) lun: String,
    pub(crate) holder: String,
    pub(crate) since: Frozen,
    pub(crate) born: Span,
    pub(crate) gone: Option<Span>,
    /// From here on the LUN may have another history.
    pub(crate) lost: Option<usize>,
}

/// A cut, and what it held.
#[derive(Clone)]
pub(crate) struct Frozen {
    pub(crate) generation: Generation,
    pub(crate) image: Image,
}

/// A snapshot that was taken during the story.
pub(crate) struct SnapshotLife {
    pub(crate) lun: String,
    pub(crate) name: String,
    pub(crate) born: Span,
    pub(crate) gone: Option<Span>,
    pub(crate) frozen: Frozen,
    /// All or none with the other snapshots of the same group.
    pub(crate) group: Option<u64>,
}

/// All that happened.
#[derive(Default)]
pub(crate) struct Lives {
    pub(crate) luns: RefCell<Vec<LunLife>>,
    pub(crate) snapshots: RefCell<Vec<SnapshotLife>>,
    pub(crate) holds: RefCell<Vec<HoldLife>>,
}

/// May or must it be there?
fn presence(born: Span, gone: Option<Span>, point: usize) -> (bool, bool) {
    let may = point > born.begin && gone.is_none_or(|g| point < g.end);
    let must = point >= born.end && gone.is_none_or(|g| point <= g.begin);
    (may, must)
}

fn right(there: bool, (may, must): (bool, bool), what: &str) -> Result<(), String> {
    match there {
        true if !may => Err(format!("{what} is there and should not be")),
        false if must => Err(format!("{what} is lost")),
        _ => Ok(()),
    }
}

#[allow(clippy::await_holding_refcell_ref)] // the story is over: nobody changes the lives any more
/// Compares pools, opened again, with what happened before `point`.
pub(crate) async fn judge(pools: &[Rc<Pool>], lives: &Lives, point: usize) -> Result<(), String> {
    let find = |name: &str| pools.iter().find_map(|pool| pool.lun(name));
    for life in lives.luns.borrow().iter() {
        let there = find(&life.name);
        right(there.is_some(), life.presence(point), &life.name)?;
        let Some(lun) = there else { continue };
        let (sectors, claimed) = (lun.shape().sectors, lun.claimed_by().is_some());
        if !possible(&life.sizes, point).contains(&sectors) {
            return Err(format!("{}: has {sectors} sectors", life.name));
        }
        if !possible(&life.claims, point).contains(&claimed) {
            return Err(format!("{}: claimed: {claimed}", life.name));
        }
        // The last era that was complete, or one of those that had begun.
        let complete = life.eras.iter().rposition(|e| e.since.end <= point).unwrap_or(0);
        let mut first = None;
        let candidates = life.eras.iter().enumerate();
        for (_, era) in candidates.filter(|(i, e)| *i >= complete && (e.since.begin < point || *i == 0)) {
            match era.witness.judge(point, &*lun).await {
                Ok(()) => {
                    first = None;
                    break;
                }
                Err(violation) => first = first.or(Some(violation)),
            }
        }
        if let Some(violation) = first {
            return Err(format!("{}: {violation:?}", life.name));
        }
    }
    let mut groups = std::collections::BTreeMap::<u64, Vec<bool>>::new();
    for life in lives.snapshots.borrow().iter() {
        // Its LUN may be in the trash.
        let Some(lun) = find(&life.lun) else { continue };
        let snapshot = lun.open_snapshot(&life.name).ok();
        let name = format!("{}@{}", life.lun, life.name);
        right(snapshot.is_some(), presence(life.born, life.gone, point), &name)?;
        if let Some(group) = life.group.filter(|_| life.gone.is_none()) {
            groups.entry(group).or_default().push(snapshot.is_some());
        }
        let Some(snapshot) = snapshot else { continue };
        if snapshot.generation() != life.frozen.generation {
            return Err(format!("{name}: has another generation"));
        }
        let found = content(&*snapshot).await.map_err(|e| format!("{name}: {e}"))?;
        let different = differences(&found.pages, &life.frozen.image.pages);
        if found.sectors != life.frozen.image.sectors || !different.is_empty() {
            return Err(format!("{name}: blocks {different:?} are not as they were frozen"));
        }
        // A revert takes a LUN out of the line; then it knows the generation no longer, which is an answer.
        no_change_missed(&*lun, &life.frozen).await.map_err(|e| format!("{name}: {e}"))?;
    }
    for life in lives.holds.borrow().iter() {
        let Some(lun) = find(&life.lun) else { continue };
        let name = format!("{} held by {}", life.lun, life.holder);
        let known = no_change_missed(&*lun, &life.since).await.map_err(|e| format!("{name}: {e}"))?;
        let (_, must) = presence(life.born, life.gone, point);
        if must && !known && life.lost.is_none_or(|lost| point <= lost) {
            return Err(format!("{name}: the generation is not known"));
        }
    }
    match groups.iter().find(|(_, there)| there.iter().any(|t| *t != there[0])) {
        Some((group, there)) => Err(format!("group {group} is split: {there:?}")),
        None => Ok(()),
    }
}

/// R43: what differs from the cut is said to be changed since. False: the generation is not known.
async fn no_change_missed(lun: &dyn Disk, since: &Frozen) -> Result<bool, String> {
    let now = content(lun).await?;
    let mut different = differences(&now.pages, &since.image.pages);
    let (mut at, sectors) = (0, lun.shape().sectors);
    while at < sectors {
        let mut out = Extents::with_limit(64);
        match lun.status(Sector(at), sectors - at, Some(since.generation), &mut out).await {
            Err(DiskError::UnknownGeneration) => return Ok(false),
            other => other.map_err(|e| format!("changes: {e}"))?,
        }
        for extent in out.iter().filter(|e| e.changed) {
            let end = extent.at.plus(extent.count).0;
            different.retain(|block| block * 8 >= end || (block + 1) * 8 <= extent.at.0);
        }
        if different.is_empty() {
            return Ok(true);
        }
        at = out.end().map_or(sectors, |e| e.0);
    }
    Err(format!("blocks {different:?} differ and are not said to be changed"))
}

/// Everything a pool shows, to see that opening it again changes nothing.
pub(crate) async fn everything(pool: &Rc<Pool>) -> Result<Vec<(String, u64)>, String> {
    let mut out = Vec::new();
    for lun in pool.luns() {
        out.push((lun.name(), digest(&content(&*lun).await?)));
        for snapshot in lun.snapshots() {
            let disk = lun.open_snapshot(&snapshot.name).map_err(|e| e.to_string())?;
            out.push((format!("{}@{}", lun.name(), snapshot.name), digest(&content(&*disk).await?)));
        }
    }
    out.sort();
    Ok(out)
}

fn digest(image: &Image) -> u64 {
    let (mut sum, mut page) = (image.sectors, 0);
    while let Some(next) = image.pages.next_page(page) {
        let mut bytes = [0; 4096];
        image.pages.read(next * 4096, &block::SegmentsMut::new(&mut bytes));
        if !lane::memory::is_zero(&bytes) {
            sum = sum.rotate_left(9) ^ next ^ u64::from(crc32c::crc32c(&bytes)) << 20;
        }
        page = next + 1;
    }
    sum
}
