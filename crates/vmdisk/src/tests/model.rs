//! Chains against vectors of bytes: what is seen through each link, whatever is written, switched, committed, given up and
//! opened again.

use std::ops::Range;

use block::DiskError;

use super::datastore::{datastore, dynamic, lun};
use super::*;
use crate::ChainError;
use crate::commit::REGION_SECTORS;
use crate::create::{create_flat, create_rdm};
use crate::rdm::{Mode, VisibleLun};

/// A little more than five regions of a commit.
const SECTORS: u64 = 5 * REGION_SECTORS + 77;
const PATH: &str = "/vm/d.vmdk";
const MOST_LINKS: usize = 5;

struct Chain {
    folder: Rc<dyn Folder>,
    luns: Vec<VisibleLun>,
    /// `None` only while it is opened again.
    disk: Option<Rc<VmDisk>>,
    /// What is seen through each link, base first; `None` where a commit was given up half way: no point in time.
    images: Vec<Option<Vec<u8>>>,
    random: fastrand::Rng,
    commits: u32,
    given_up: u32,
}

fn bytes(at: u64, count: u64) -> Range<usize> {
    at as usize * UNIT..(at + count) as usize * UNIT
}

impl Chain {
    /// A base of each kind in turn: thin, zeroed lazily, zeroed eagerly, a mapped LUN.
    async fn new(seed: u64) -> Self {
        let folder = dynamic(&datastore().await);
        let (identity, seen) = lun(1, SECTORS);
        match seed % 4 {
            0 => create_flat(&folder, PATH, SECTORS, Provision::Thin).await.unwrap(),
            1 => create_flat(&folder, PATH, SECTORS, Provision::LazyZeroed).await.unwrap(),
            2 => create_flat(&folder, PATH, SECTORS, Provision::EagerZeroed).await.unwrap(),
            _ => create_rdm(&folder, PATH, &identity, Mode::Virtual).await.unwrap(),
        }
        let mut chain = Self {
            folder,
            luns: vec![seen],
            disk: None,
            images: vec![Some(vec![0; SECTORS as usize * UNIT])],
            random: fastrand::Rng::with_seed(seed),
            commits: 0,
            given_up: 0,
        };
        chain.disk = Some(chain.open(PATH, Open::WRITE).await.unwrap());
        chain
    }

    async fn open(&self, path: &str, how: Open) -> Result<Rc<VmDisk>, ChainError> {
        VmDisk::open(Rc::clone(&self.folder), path, how, &self.luns).await
    }

    fn disk(&self) -> Rc<VmDisk> {
        Rc::clone(self.disk.as_ref().unwrap())
    }

    fn top(&mut self) -> &mut Vec<u8> {
        self.images.last_mut().unwrap().as_mut().unwrap()
    }

    /// A range: often short, now and then over several regions, often where something was before.
    fn range(&mut self) -> (u64, u64) {
        let at = match self.random.u8(0..3) {
            0 => self.random.u64(0..64),
            1 => REGION_SECTORS - 8 + self.random.u64(0..16),
            _ => self.random.u64(0..SECTORS),
        };
        let count =
            if self.random.u8(0..10) == 0 { self.random.u64(1..1200) } else { self.random.u64(1..24) };
        (at, count.min(SECTORS - at))
    }

    async fn change(&mut self) {
        let (disk, (at, count)) = (self.disk(), self.range());
        let byte = self.random.u8(1..);
        let fill = vec![byte; count as usize * UNIT];
        match self.random.u8(0..12) {
            0 => {
                disk.zero(Sector(at), count, self.random.bool()).await.unwrap();
                self.top()[bytes(at, count)].fill(0);
            }
            1 => {
                disk.unmap(Sector(at), count).await.unwrap();
                // A hint: each sector is as it was, or zero where the disk says that it would be.
                let found = read(&*disk, at, count).await;
                let zeroes = disk.shape().unmap_reads_zero;
                let old = &mut self.top()[bytes(at, count)];
                for (old, found) in old.chunks_mut(UNIT).zip(found.chunks(UNIT)) {
                    let is_zero = found.iter().all(|b| *b == 0);
                    assert!(is_zero || (!zeroes && old == found), "unmapped: neither zero nor as it was");
                    old.copy_from_slice(found);
                }
            }
            2 => disk.flush().await.unwrap(),
            3 => {
                let mut expected = self.top()[bytes(at, count)].to_vec();
                let fits = self.random.bool();
                if !fits {
                    let wrong = self.random.usize(0..expected.len());
                    expected[wrong] ^= 1;
                }
                let (expected, new) = (Segments::new(&expected), Segments::new(&fill));
                match disk.compare_and_write(Sector(at), &expected, &new).await {
                    Ok(()) if fits => self.top()[bytes(at, count)].fill(byte),
                    Err(DiskError::Miscompare { .. }) if !fits => {}
                    other => panic!("fits: {fits}, answered {other:?}"),
                }
            }
            choice => {
                let safe = if choice < 6 { Safe::OnReturn } else { Safe::AtNextFlush };
                disk.write(Sector(at), &Segments::new(&fill), safe).await.unwrap();
                self.top()[bytes(at, count)].fill(byte);
            }
        }
    }

    async fn switch(&mut self) {
        switch(&self.disk()).await;
        let top = self.top().clone();
        self.images.push(Some(top));
    }

    /// Folds everything above one link into it; the guest writes in between. Now and then it is given up half way.
    async fn commit(&mut self) {
        let disk = self.disk();
        let (into, top) = (self.random.usize(0..self.images.len() - 1), self.images.len() - 1);
        let commit = disk.start_commit(into).await.unwrap();
        let gives_up = self.random.u8(0..4) == 0;
        loop {
            let mut rounds = self.random.u8(0..3);
            let mut go_on = |_| {
                rounds = rounds.saturating_sub(1);
                rounds > 0
            };
            commit.copy(&mut go_on).await.unwrap();
            for _ in 0..self.random.u8(0..4) {
                self.change().await;
            }
            let progress = commit.progress();
            if gives_up && (progress.done_bytes == progress.total_bytes || self.random.bool()) {
                self.given_up += 1;
                self.images[into..top].fill(None);
                return;
            }
            if progress.done_bytes == progress.total_bytes {
                break;
            }
        }
        let left = commit.flip(async || Ok(())).await.unwrap();
        drop(commit);
        left.remove().await.unwrap();
        let image = self.images.pop();
        self.images.truncate(into);
        self.images.extend(image);
        self.commits += 1;
    }

    /// Closed properly or just left; each link that is a point in time is opened to be read, the others refuse.
    async fn reopen(&mut self) {
        let (path, links) = (self.disk().top_path(), self.disk().links());
        if self.random.bool() {
            self.disk().close().await.unwrap();
        } else {
            self.disk().flush().await.unwrap();
        }
        self.disk = None;
        let number = self.random.usize(0..links.len());
        match (&self.images[number], self.open(&links[number].path, Open::READ).await) {
            (Some(image), Ok(disk)) => {
                assert!(read(&*disk, 0, SECTORS).await == *image, "read-only through link {number}");
            }
            (None, Err(ChainError::Mixed { .. })) => {}
            // A link between the mixture and the top that began the commit: it is marked below.
            (None, Ok(_)) => {
                let below = self.images[..number].iter().any(Option::is_none);
                assert!(below, "link {number} is a mixture and opens");
            }
            (image, answer) => {
                let (sound, answer) = (image.is_some(), answer.err().map(|e| e.to_string()));
                panic!("link {number}, sound: {sound}, answered {answer:?}");
            }
        }
        self.disk = Some(self.open(&path, Open::WRITE).await.unwrap());
    }

    async fn judge(&mut self) {
        let disk = self.disk();
        assert_eq!(disk.links().len(), self.images.len());
        assert!(read(&*disk, 0, SECTORS).await == *self.top(), "the top");
        for number in 0..self.images.len() - 1 {
            if let Some(image) = &self.images[number] {
                let frozen = disk.frozen(number).unwrap();
                assert!(read(&*frozen, 0, SECTORS).await == *image, "through link {number}");
            }
        }
    }
}

async fn story(seed: u64) -> (u32, u32) {
    let mut chain = Chain::new(seed).await;
    for _ in 0..120 {
        match chain.random.u8(0..24) {
            0 | 1 if chain.images.len() < MOST_LINKS => chain.switch().await,
            2 | 3 if chain.images.len() > 1 => chain.commit().await,
            4 => chain.reopen().await,
            5 => chain.judge().await,
            _ => chain.change().await,
        }
    }
    chain.judge().await;
    (chain.commits, chain.given_up)
}

#[test]
fn soak_chains_agree_with_a_model() {
    let mut done = (0, 0);
    for seed in seeds(12, 300) {
        eprintln!("KAGAMI_SEED={seed}");
        let (commits, given_up) = lane::block_on(story(seed));
        done = (done.0 + commits, done.1 + given_up);
    }
    assert!(std::env::var_os("KAGAMI_SEED").is_some() || (done.0 > 0 && done.1 > 0), "{done:?}");
}
