//! What the tests of the repository share: seeded noise, a disk that tracks its changes, plans, directories.
#![allow(clippy::unwrap_used)] // a test says by it what must hold
#![allow(dead_code)] // each test program uses its part of it

pub mod power;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use backup::{Audit, Label, Plan, SourceDisk, Trust};
use block::{
    Disk, DiskError, Extent, Extents, Generation, Io, Kind, Safe, Sector, Segments, SegmentsMut, Shape,
    check_range,
};

/// Seeded noise.
pub struct Noise(blake3::OutputReader);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    pub fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.fill(&mut bytes);
        bytes
    }

    /// Words and numbers, about 3:1.
    pub fn text(&mut self, count: usize) -> Vec<u8> {
        let words = ["extent ", "lun ", "redo log ", "mirror ", "grain ", "layer ", "cut ", "snapshot "];
        let mut out = Vec::with_capacity(count + 32);
        while out.len() < count {
            out.extend_from_slice(words[self.below(8) as usize].as_bytes());
            if self.below(6) == 0 {
                out.extend_from_slice(format!("{} ", self.next() % 100_000).as_bytes());
            }
        }
        out.truncate(count);
        out
    }
}

/// A directory that goes away.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        // Memory where there is some: crash tests sync thousands of times.
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = base.join(format!("kagami-backup-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A sparse disk that knows what was written since each cut, in blocks of 4 KiB, and counts what is read of it.
pub struct TrackedDisk {
    sectors: Cell<u64>,
    blocks: RefCell<BTreeMap<u64, Rc<[u8; 4096]>>>,
    /// Changed blocks: which cut they came after.
    changed: RefCell<BTreeMap<u64, u64>>,
    counter: Cell<u64>,
    /// Blocks of which the tracking says nothing, to plant a fault.
    lies: RefCell<Vec<u64>>,
    pub read_bytes: Cell<u64>,
}

impl TrackedDisk {
    pub fn new(sectors: u64) -> Rc<Self> {
        Rc::new(Self {
            sectors: Cell::new(sectors),
            blocks: RefCell::default(),
            changed: RefCell::default(),
            counter: Cell::new(1),
            lies: RefCell::default(),
            read_bytes: Cell::new(0),
        })
    }

    pub fn generation(counter: u64) -> Generation {
        Generation { counter, id: 0x6b61_6761_6d69 + u128::from(counter) }
    }

    /// Ends a generation: what is written from now on counts as changed since the answer.
    pub fn cut(&self) -> Generation {
        let now = self.counter.get();
        self.counter.set(now + 1);
        Self::generation(now)
    }

    pub fn put(&self, at_block: u64, bytes: &[u8]) {
        for (n, part) in bytes.chunks(4096).enumerate() {
            let mut block = [0; 4096];
            block[..part.len()].copy_from_slice(part);
            self.blocks.borrow_mut().insert(at_block + n as u64, Rc::new(block));
            self.changed.borrow_mut().insert(at_block + n as u64, self.counter.get());
        }
    }

    /// Writes without telling the tracking.
    pub fn put_secretly(&self, at_block: u64, bytes: &[u8]) {
        let before = self.changed.borrow().get(&at_block).copied();
        self.put(at_block, bytes);
        match before {
            Some(counter) => self.changed.borrow_mut().insert(at_block, counter),
            None => self.changed.borrow_mut().remove(&at_block),
        };
    }

    pub fn clear(&self, at_block: u64, count: u64) {
        for block in at_block..at_block + count {
            self.blocks.borrow_mut().remove(&block);
            self.changed.borrow_mut().insert(block, self.counter.get());
        }
    }

    pub fn resize(&self, sectors: u64) {
        let (old, new) = (self.sectors.get().div_ceil(8), sectors.div_ceil(8));
        self.sectors.set(sectors);
        self.blocks.borrow_mut().retain(|block, _| *block < new);
        for block in old.min(new).saturating_sub(1)..new {
            self.changed.borrow_mut().insert(block, self.counter.get());
        }
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.sectors.get() as usize * 512];
        for (block, content) in &*self.blocks.borrow() {
            let at = *block as usize * 4096;
            let count = (out.len() - at).min(4096);
            out[at..at + count].copy_from_slice(&content[..count]);
        }
        out
    }

    /// A copy that does not change: what a snapshot is.
    pub fn freeze(&self) -> Rc<Self> {
        Rc::new(Self {
            sectors: self.sectors.clone(),
            blocks: self.blocks.clone(),
            changed: self.changed.clone(),
            counter: self.counter.clone(),
            lies: self.lies.clone(),
            read_bytes: Cell::new(0),
        })
    }
}

fn ready<'a>(result: Result<(), DiskError>) -> Io<'a> {
    Box::pin(std::future::ready(result))
}

impl Disk for TrackedDisk {
    fn shape(&self) -> Shape {
        Shape {
            sectors: self.sectors.get(),
            physical_block_bytes: 4096,
            read_only: true,
            unmap_reads_zero: true,
            memory_align: 1,
        }
    }

    fn read<'a>(&'a self, at: Sector, into: &'a SegmentsMut<'a>) -> Io<'a> {
        let count = into.len() as u64 / 512;
        ready(check_range(self.sectors.get(), at, count).map(|()| {
            self.read_bytes.set(self.read_bytes.get() + into.len() as u64);
            let blocks = self.blocks.borrow();
            for sector in at.0..at.0 + count {
                let to = (sector - at.0) as usize * 512;
                match blocks.get(&(sector / 8)) {
                    Some(block) => into.copy_from(to, &block[(sector % 8) as usize * 512..][..512]),
                    None => into.zero(to, 512),
                }
            }
        }))
    }

    fn write<'a>(&'a self, _: Sector, _: &'a Segments<'a>, _: Safe) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }

    fn zero(&self, _: Sector, _: u64, _: bool) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
    }

    fn unmap(&self, _: Sector, _: u64) -> Io<'_> {
        ready(Err(DiskError::ReadOnly))
    }

    fn status<'a>(
        &'a self,
        at: Sector,
        count: u64,
        since: Option<Generation>,
        out: &'a mut Extents,
    ) -> Io<'a> {
        ready(check_range(self.sectors.get(), at, count).and_then(|()| {
            let end = at.0 + count;
            let after = match since {
                Some(g) if g != Self::generation(g.counter) || g.counter >= self.counter.get() => {
                    return Err(DiskError::UnknownGeneration);
                }
                Some(g) => g.counter,
                None => 0,
            };
            let (blocks, changed) = (self.blocks.borrow(), self.changed.borrow());
            let mut sector = at.0;
            while sector < end {
                let block = sector / 8;
                let next = [
                    blocks.range(block..).next().map(|(b, _)| *b),
                    changed.range(block..).next().map(|(b, _)| *b),
                ];
                let next = next.into_iter().flatten().min().unwrap_or(u64::MAX / 8);
                let (stop, kind, changed) = if next > block {
                    (next * 8, Kind::Hole, since.is_none())
                } else {
                    let kind = if blocks.contains_key(&block) { Kind::Data } else { Kind::Zero };
                    let newer = changed.get(&block).is_some_and(|c| *c > after);
                    ((block + 1) * 8, kind, since.is_none() || newer)
                };
                let count = stop.min(end) - sector;
                if !out.push(Extent { at: Sector(sector), count, kind, changed }) {
                    break;
                }
                sector += count;
            }
            Ok(())
        }))
    }

    fn compare_and_write<'a>(&'a self, _: Sector, _: &'a Segments<'a>, _: &'a Segments<'a>) -> Io<'a> {
        ready(Err(DiskError::ReadOnly))
    }

    fn flush(&self) -> Io<'_> {
        ready(Ok(()))
    }
}

/// One disk to be backed up.
pub fn source(name: &str, disk: Rc<dyn Disk>, cut: Option<Generation>) -> SourceDisk {
    SourceDisk { name: name.into(), disk, cut, trust: Trust::default(), metadata: Default::default() }
}

/// A plan of some disks.
pub fn plan(disks: Vec<SourceDisk>, base: Option<backup::BackupId>) -> Plan {
    Plan {
        id: backup::BackupId::new(),
        name: "vm".into(),
        label: Label::Crash,
        base,
        disks,
        files: vec![("vm.vmx".into(), b"displayName = \"vm\"\n".to_vec())],
        metadata: Default::default(),
        audit: Audit { seed: Some([1; 32]), ..Audit::default() },
    }
}

/// Bytes of all files below a directory.
pub fn directory_bytes(path: &Path) -> u64 {
    std::fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| match e.file_type().unwrap().is_dir() {
            true => directory_bytes(&e.path()),
            false => e.metadata().unwrap().len(),
        })
        .sum()
}
